"""Divergences by name, the package's and a user's own."""

import subprocess
import sys

import pytest

from switchkd import losses
from switchkd.losses.named import check_divergence, divergence

OWN = """
import torch

NATS = 0.5

def cosine(student_logits, teacher_logits):
    return 1 - torch.cosine_similarity(student_logits, teacher_logits, dim=-1)

class Scaled:
    @staticmethod
    def twice(student_logits, teacher_logits):
        return 2 * cosine(student_logits, teacher_logits)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "losses.py").write_text(OWN)
    (package / "needs.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_package"]:
        del sys.modules[name]


def test_the_packages_own_names():
    functions = [losses.dbild_loss, losses.bild_loss, losses.forward_kl, losses.reverse_kl, losses.jsd]
    assert [divergence(name) for name in ("dbild", "bild", "forward_kl", "reverse_kl", "jsd")] == functions


def test_a_users_function_is_found_by_module_and_name(own):
    import torch

    logits = torch.eye(3)
    assert divergence("their_package.losses:cosine")(logits, logits.roll(1, 0)).tolist() == [1.0, 1.0, 1.0]
    assert divergence("their_package.losses:Scaled.twice")(logits, logits.roll(1, 0)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dbld", r"unknown divergence 'dbld' \(did you mean dbild\?\): give one of dbild, bild, forward_kl"),
        ("forward-kl", r"did you mean forward_kl\?"),
        ("cosine", r"unknown divergence 'cosine': give one of"),
        ("", "unknown divergence ''"),
        ("their_package/losses.py:cosine", "unknown divergence 'their_package/losses.py:cosine'"),
        ("their_package.losses:", "or your own function as package.module:function"),
        ("their_package.losses.cosine", "or your own function as package.module:function"),
    ],
)
def test_a_name_that_says_nothing_is_refused_before_anything_is_imported(name, message):
    with pytest.raises(ValueError, match=message):
        check_divergence(name)
    with pytest.raises(ValueError, match=message):
        divergence(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("their_packge.losses:cosine", "no module their_packge: put the folder that holds it on PYTHONPATH"),
        ("their_package.loses:cosine", "no module their_package.loses: put"),
        ("their_package.losses:cosin", r"losses.py has no cosin \(did you mean cosine\?\)"),
        ("their_package.losses:Scaled.thrice", "losses.py has no Scaled.thrice"),
        ("their_package.losses:NATS", "NATS in .*losses.py is a float and cannot be called"),
        ("their_package.needs:cosine", "their_package.needs cannot be imported, No module named 'a_module_that_nob"),
    ],
)
def test_what_is_missing_of_a_users_function_is_named(own, name, message):
    check_divergence(name)  # the form is right
    with pytest.raises(ValueError, match=message):
        divergence(name)


def test_a_name_is_judged_without_torch():
    code = (
        "import sys; from switchkd.losses import check_divergence; check_divergence('jsd'); "
        "check_divergence('mine.losses:cosine'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
