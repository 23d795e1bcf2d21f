"""Small models trained on real pictures that packages ship: each a command, minutes on two cores.

``python -m ffnet.examples.segment_textures`` and ``python -m ffnet.examples.detect_coins``;
``pip install 'ffnet-kernels[examples]'`` brings the pictures.
"""
