import pytest
from PIL import Image

from switchkd.models.tiny import tiny_processor


@pytest.fixture(scope="session")
def processor():
    return tiny_processor(image_size=32, patch_size=8)  # 16 tokens an image


@pytest.fixture
def picture(tmp_path):
    """The path of a 40x30 JPEG below tmp_path."""
    path = tmp_path / "plate.jpg"
    Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    return path
