"""Ten skills: what each way to listen to a teacher gives a student, over seeds, in a world that we own.

    python -m eval.ten_skills --size cpu                          # its table, under 20 minutes on 2 cores
    PYTHONPATH=. python3 -m eval.ten_skills --size gpu --pieces core --workers 8 --minutes 9
    PYTHONPATH=. python3 -m eval.ten_skills --size gpu --pieces divergence,knee --workers 8 --minutes 9
    PYTHONPATH=. python3 -m eval.ten_skills --size gpu --pieces temperature,weights,encoder --workers 8 --minutes 9
    PYTHONPATH=. python3 -m eval.ten_skills --size gpu --pieces visual,schedule,seen --workers 8 --minutes 9
    PYTHONPATH=. python3 -m eval.ten_skills --size gpu --confirm --workers 8 --minutes 9
    python -m eval.ten_skills --size gpu --table                  # the table and the plots of what is there
    python -m eval.ten_skills --size cpu --variant my_losses:cosine  # its table with a row of your own

Each command goes on where it was stopped and does what is missing; repeat one until it says that nothing is left. The
teacher is trained once; every variant of a seed then begins at the same student and sees the same batches. Variants
are chosen on the validation split with seeds 0-2, and `--confirm` trains SFT, the paper's setting and the best found
with seeds 3-5 and judges them on the test split, which nothing else reads. `--variant package.module:function` adds a
row whose align and switch term is your own divergence, [N, V] (student's logits), [N, V] (teacher's) -> [N]. Results
are a line each in `eval/results/ten_skills/SIZE.jsonl`, the weights are in `runs/ten_skills`. A result of other
settings is refused, not replaced; so is that of a function whose source has changed since.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.records import Job, Refused, Results
from eval.runner import Step, add_flags, complete, missing, opened, variants_of
from eval.ten_skills.bench import TEACHER, Bench
from eval.ten_skills.report import best_found, best_sft, plots, table
from eval.ten_skills.sizes import CONFIRM_SEEDS, SEEDS, SIZES
from eval.ten_skills.variants import PIECES, Variant, variant

HOME = Path(__file__).parents[1]


def steps_of(jobs: Sequence[Job]) -> list[Step]:
    """The jobs, and before each what it begins from; the teacher first, since most wait for it."""
    steps: dict[str, Step] = {}

    def add(step: Step) -> str:
        steps.setdefault(step.name, step)
        return step.name

    tower = add(Step("tower", ("tower",)))
    teacher = add(Step("teacher", (), (tower,)))
    for job in jobs:
        if job.variant == TEACHER:
            add(Step.of(job, teacher))
            continue
        row = variant(job.variant)
        begins = teacher
        if job.start != TEACHER:
            begins = add(Step("tower", ("narrow" if row.narrow else "apart",)))
        start = add(Step("start", (job.start, job.seed, row.narrow), (begins,)))
        add(Step.of(job, start) if row.options is None else Step.of(job, start, teacher))
    return list(steps.values())


def jobs_of(variants: Sequence[Variant], seeds: Sequence[int]) -> list[Job]:
    """What the variants ask for on the validation split, the teacher's row included."""
    jobs = dict.fromkeys(
        Job(each.name, start, seed, "validation") for each in variants for start in each.starts for seed in seeds
    )
    # What needs no teacher comes first: it is done while the teacher trains.
    order = sorted(jobs, key=lambda job: (job.start == TEACHER, variant(job.variant).options is not None))
    return [Job(TEACHER, "", 0, "validation"), *order]


def best_jobs(results: Results, seeds: Sequence[int]) -> list[Job]:
    """The best found from the teacher's tower too: the last row of the core table."""
    best = best_found(results, seeds)
    return [Job(best, TEACHER, seed, "validation") for seed in seeds] if best else []


def confirm_jobs(results: Results, seeds: Sequence[int], confirm_seeds: Sequence[int]) -> list[Job]:
    """SFT at its best rate, the paper's setting and the best found on seeds and a split that chose nothing.

    Raises Refused where the choice has not been made yet.
    """
    jobs = [Job(TEACHER, "", 0, "test")]
    for start in ("apart", TEACHER):
        sft, best = best_sft(results, start, seeds), best_found(results, seeds)
        if sft is None or best is None or not results.rows("switch_kd", start, "validation", seeds):
            raise Refused("there is nothing to confirm yet: run the core piece first (--pieces core)")
        for name in dict.fromkeys((sft, "switch_kd", best)):
            jobs += [Job(name, start, seed, "test") for seed in confirm_seeds]
    return jobs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.ten_skills", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    add_flags(parser, PIECES, SEEDS, HOME / "results" / "ten_skills")
    parser.add_argument(
        "--variant", action="append", default=[], help="a row more: a variant's name, or package.module:function"
    )
    parser.add_argument("--confirm", action="store_true", help="seeds 3-5 on the test split, after the pieces")
    parser.add_argument("--work", type=Path, default=HOME.parent / "runs" / "ten_skills")
    options = parser.parse_args(argv)
    size = SIZES[options.size]
    is_cuda = size.name == "gpu"
    if is_cuda and not torch.cuda.is_available() and not options.table:
        parser.error("--size gpu needs a GPU and torch sees none: run --size cpu")
    path, begun = options.out / f"{size.name}.jsonl", time.monotonic()
    seeds, confirm_seeds = SEEDS[: options.seeds], CONFIRM_SEEDS[: options.seeds]
    try:
        asked = variants_of(PIECES, options.pieces.split(",") if options.pieces else size.pieces)
        asked += [variant(name) for name in options.variant]
    except ValueError as error:
        parser.error(str(error))
    bench = functools.partial(
        Bench, size, options.work, device="cuda" if is_cuda else "cpu", drawers=4 if is_cuda else 1
    )
    workers = options.workers or (4 if is_cuda else 2)

    def do(jobs: Sequence[Job]) -> bool:
        """Whether all of them are there at the end."""
        todo = missing(jobs, bench(), path)
        if not todo:
            return True
        print(f"{len(todo)} of {len(jobs)} runs to do, {workers} at a time", flush=True)
        minutes = None if options.minutes is None else options.minutes - (time.monotonic() - begun) / 60
        left = [step for step in complete(steps_of(todo), path, pool, workers=workers, minutes=minutes) if step.job]
        if left:
            print(f"{len(left)} runs are left: give the same command again")
        return not left

    try:
        if not options.table:
            # Everything, where neither rows nor the confirmation are asked for alone.
            is_asked = bool(options.pieces or options.variant)
            everything = not is_asked and not options.confirm
            with opened(bench, workers, threads=None if is_cuda else 1) as pool:
                whole = True
                if everything or is_asked:
                    whole = do(jobs_of(asked, seeds)) and do(best_jobs(Results.of(path), seeds))
                if whole and (options.confirm or (everything and size.evidence)):
                    do(confirm_jobs(Results.of(path), seeds, confirm_seeds))
        results = Results.of(path)
        report = table(results, size.name, seeds)
    except Refused as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{size.name}.md").write_text(report)
    if results.records:
        plots(results, options.out, size.name, seeds)
    print("\n" + report)
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
