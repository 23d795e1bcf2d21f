"""Small models trained on real data that packages ship: each is one command and takes minutes on two cores, without a
network.

``python -m ffnet.examples.segment_textures``, ``detect_coins``, ``super_resolution`` and ``forecasting``;
``pip install 'ffnet-kernels[examples]'`` brings the data.
"""
