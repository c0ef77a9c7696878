"""The README says what is true: its code runs as written, its commands and files exist."""

import re
import subprocess
from pathlib import Path

import pytest

from switchkd.tasks import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_your_own_loss_runs_as_written_and_trains_a_batch(tokenizer):
    (code,) = blocks("python")
    body = code.split("\n\n\n")[1:]  # without the imports
    lines = [line for part in body for line in part.splitlines() if line.strip()]
    assert len(lines) <= 10
    names = {}
    exec(code, names)
    ids = tokenizer("<|im_start|>user\n" + "<image>" * 36 + "Where?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>")
    import torch

    ids = torch.tensor([ids["input_ids"]])
    labels = ids.clone()
    labels[:, :-2] = -100
    terms = names["method"](ids, torch.ones_like(ids), torch.randn(1, 3, 96, 96), labels)
    assert terms.named.keys() == {"ce", "align", "switch"}
    terms.loss.backward()
    assert names["student"].lm_head.weight.grad.abs().sum() > 0


def test_files_and_links_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    named = re.findall(r"(?:recipes|switchkd|eval)/[\w./-]+\.\w+", README)
    assert links
    assert named
    for path in links + named:
        assert (ROOT / path).exists(), path


def test_flags_exist():
    flags = set(re.findall(r"--((?:data|train|method|student|teacher|judge)\.\w+|name|resume|config)\b", README))
    assert {"data.root", "train.lr", "resume"} <= flags
    values = {
        "name": "x",
        "resume": "false",
        "train.lr": "1e-3",
        "method.switch": "forward_kl",
        "method.align": "jsd",
        "data.source": "llava",
        "train.batch_size": "16",
    }
    for flag in sorted(flags - {"config", "name"}):
        # data.root and the splits are read where the data are files
        load_config(["--name", "x", "--data.source", "voc", f"--{flag}", values.get(flag, "x")])


def test_ci_runs_the_readmes_test_command():
    """`.ci/run` cuts the block out of the README; what it cuts is the block that a reader copies."""
    cut = re.search(r"tests=\$\((awk .*)\)", (ROOT / ".ci/run").read_text())[1]
    found = subprocess.run(["bash", "-c", cut], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == next(block for block in blocks("sh") if "pytest" in block).strip()


@pytest.mark.parametrize("word", ["TABLE\n", "SEEDS\n", "TODO", "TBD"])
def test_nothing_is_left_open(word):
    assert word not in README
