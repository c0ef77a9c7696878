import pytest
from PIL import Image, ImageOps

from switchkd.data.images import ORIENTATION, UPRIGHT, check_image, load_image, orientation


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("stated", [1, *UPRIGHT])
def test_pictures_are_turned_upright_once(tmp_path, suffix, stated):
    stored = Image.effect_noise((64, 48), 80).convert("RGB")
    tags = Image.Exif()
    tags[ORIENTATION] = stated
    stored.save(tmp_path / f"a{suffix}", exif=tags)
    assert orientation(tmp_path / f"a{suffix}") == stated
    upright = load_image(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as opened:
        assert upright.tobytes() == ImageOps.exif_transpose(opened).tobytes()
    assert upright.size == ((48, 64) if stated >= 5 else (64, 48))
    assert load_image(upright).tobytes() == upright.tobytes()


def test_a_broken_orientation_does_not_spoil_a_picture(tmp_path):
    stored = Image.effect_noise((8, 6), 80).convert("RGB")
    stored.save(tmp_path / "a.png", exif=b"Exif\0\0no tags at all")
    assert orientation(tmp_path / "a.png") == 1
    assert load_image(tmp_path / "a.png").tobytes() == stored.tobytes()


def test_load_image_gives_rgb_and_refuses_deep_pictures(tmp_path):
    Image.new("L", (4, 3), 200).save(tmp_path / "grey.png")
    grey = load_image(tmp_path / "grey.png")
    assert (grey.mode, grey.size, grey.getpixel((0, 0))) == ("RGB", (4, 3), (200, 200, 200))
    Image.new("I;16", (4, 3), 40000).save(tmp_path / "deep.png")
    for read in (load_image, check_image):
        with pytest.raises(ValueError, match=r"deep\.png: has more than 8 bits a channel"):
            read(tmp_path / "deep.png")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.jpg: cannot be read as an image"):
        load_image(tmp_path / "text.jpg")
