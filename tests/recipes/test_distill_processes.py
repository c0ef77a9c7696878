"""The recipe in processes of its own: killed and resumed, its student loaded without the package, real images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe_run import RECIPES, load_recipe, start_process, write_pair

from switchkd.data import encode_prompt
from switchkd.data.sources import load_conversations
from switchkd.tasks import load_config, vlm

pytestmark = pytest.mark.slow


def terms(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "ce" in record]


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    config = str(write_pair(tmp_path, train={"steps": 80, "checkpoint_every": 10}))
    assert start_process("--config", config, "--name", "whole").wait() == 0
    whole, killed = tmp_path / "runs/whole", tmp_path / "runs/killed"
    stage = killed / "checkpoints/distil"
    process = start_process("--config", config, "--name", "killed")
    try:
        while not (stage / "checkpoint-10/checkpoint.json").exists():
            assert process.poll() is None, "the process ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.kill()  # SIGKILL
        process.wait()
    assert not (killed / "student").exists()
    assert (stage / "checkpoint-10").exists()
    undistilled = (killed / "undistilled/model.safetensors").stat()

    assert start_process("--config", config, "--name", "killed", "--resume", "true").wait() == 0
    for stage in ("undistilled", "student"):
        for file in (whole / stage).iterdir():
            assert (killed / stage / file.name).read_bytes() == file.read_bytes(), file
    assert (killed / "undistilled/model.safetensors").stat().st_mtime_ns == undistilled.st_mtime_ns
    assert terms(killed) == terms(whole)
    for name in ("results.json", "answers.jsonl", "table.md"):
        assert (killed / name).read_text() == (whole / name).read_text()


# Only what a user of the student has: transformers, and the folder.
STOCK = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture, question, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits
    written = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
assert not [name for name in sys.modules if name.split(".")[0] == "switchkd"]
expected = np.load(picture.replace(".png", ".npy"))
answer = processor.decode(written, skip_special_tokens=True)
print(json.dumps({"difference": float(np.abs(logits.numpy() - expected).max()), "answer": answer}))
"""


def test_the_student_runs_without_the_package(tmp_path, monkeypatch):
    config = write_pair(tmp_path, train={"steps": 100, "lr": 1e-2, "checkpoint_every": 0})
    recipe, trained = load_recipe(), {}
    export = vlm.export

    def keep(trainer, stage, run):
        export(trainer, stage, run)
        trained[stage.name] = trainer.method.student.eval().cpu(), trainer.processing_class

    monkeypatch.setattr(vlm, "export", keep)
    run = recipe.main(["--config", str(config)])
    student, processor = trained["distil"]
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    said = {row["id"]: row["answer"] for row in answers if row["model"] == "Switch-KD"}
    for number, question in enumerate(load_conversations(load_config(["--config", str(config)]).data).test[:2]):
        inputs = encode_prompt(question.messages[:1], question.images, processor)
        with torch.no_grad():
            logits = student(inputs["input_ids"][None], inputs["pixel_values"]).logits
        np.save(tmp_path / f"{number}.npy", logits.numpy())
        question.images[0].save(tmp_path / f"{number}.png")
        picture, threads = str(tmp_path / f"{number}.png"), str(torch.get_num_threads())
        shown = subprocess.run(
            [sys.executable, "-c", STOCK, str(run / "student"), picture, question.question, threads],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert shown.returncode == 0, shown.stderr
        found = json.loads(shown.stdout)
        assert found == {"difference": 0.0, "answer": said[question.id]}
        assert found["answer"]


@pytest.mark.skipif(
    not (Path(os.environ.get("SWITCHKD_DATA", "")) / "neu-det/annotations").is_dir(),
    reason="NEU-DET not found: set SWITCHKD_DATA",
)
def test_the_neu_det_configuration_runs(tmp_path):
    config = str(RECIPES / "configs/neu_det.yaml")
    few = {
        "out": tmp_path, "threads": torch.get_num_threads(), "data.train_images": 24, "data.test_images": 6,
        "teacher.steps": 2, "train.steps": 2, "train.batch_size": 8, "judge.max_new_tokens": 16,
    }  # fmt: skip
    arguments = [text for name, value in few.items() for text in (f"--{name}", str(value))]
    run = load_recipe().main(["--config", config, *arguments])
    results = json.loads((run / "results.json").read_text())
    assert all(scores["questions"]["classify"] == 6 for scores in results.values())
    assert {path.name for path in run.iterdir() if path.is_dir()} == {
        "teacher",
        "undistilled",
        "student",
        "checkpoints",
    }
    assert (run / "boxes.png").is_file()
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    pictures = {Path(row["id"]).parts[0] for row in rows}
    folder = Path(os.environ["SWITCHKD_DATA"]) / "neu-det"
    assert pictures <= set((folder / "splits/index240_val.txt").read_text().split())


def test_two_processes_make_one_run(tmp_path):
    config = str(write_pair(tmp_path))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, str(RECIPES / "distill_tinyllava.py"), "--config", config], env=environment, check=True)
    assert [folder.name for folder in (tmp_path / "runs").iterdir() if folder.name != ".checks"] == ["plate"]
    rows = [json.loads(line) for line in (tmp_path / "runs/plate/answers.jsonl").read_text().splitlines()]
    questions = [row["id"] for row in rows if row["model"] == "teacher"]
    assert len(set(questions)) == len(questions) == 12
    assert [row["id"] for row in rows] == 4 * questions
