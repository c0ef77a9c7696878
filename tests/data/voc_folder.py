"""A small Pascal VOC folder for tests."""

from collections import Counter

from PIL import Image

from switchkd.data.config import DataConfig

XML = (
    "<annotation><size><width>20</width><height>10</height></size><object><name>{}</name><bndbox><xmin>2</xmin>"
    "<ymin>3</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"
)


def write_voc(root, **splits):
    """splits: name -> classes of its images, one box each; images are called CLASS_NUMBER."""
    numbers = Counter()
    for folder in ("annotations", "images", "splits"):
        (root / folder).mkdir(parents=True)
    for split, classes in splits.items():
        stems = []
        for name in classes:
            numbers[name] += 1
            stems.append(f"{name}_{numbers[name]}")
            Image.effect_noise((20, 10), 50).save(root / "images" / f"{stems[-1]}.jpg")
            (root / "annotations" / f"{stems[-1]}.xml").write_text(XML.format(name))
        (root / "splits" / f"{split}.txt").write_text("\n".join(stems))
    return DataConfig(source="voc", root=str(root))
