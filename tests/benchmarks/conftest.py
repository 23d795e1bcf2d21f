import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Busy cores make small maps on several threads very slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
