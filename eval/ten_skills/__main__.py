"""Ten skills: what each way to listen to a teacher gives a student, over seeds, in a world that we own.

    python -m eval.ten_skills --size cpu                          # its table, under 20 minutes on 2 cores
    PYTHONPATH=. python3 -m eval.ten_skills --size gpu --pieces core --workers 8 --minutes 9
    PYTHONPATH=. python3 -m eval.ten_skills --size gpu --pieces divergence,knee --workers 8 --minutes 9
    PYTHONPATH=. python3 -m eval.ten_skills --size gpu --pieces temperature,weights,encoder --workers 8 --minutes 9
    PYTHONPATH=. python3 -m eval.ten_skills --size gpu --pieces visual,schedule,seen --workers 8 --minutes 9
    PYTHONPATH=. python3 -m eval.ten_skills --size gpu --confirm --workers 8 --minutes 9
    python -m eval.ten_skills --size gpu --table                  # the table and the plots of what is there

Each command goes on where it was stopped and does what is missing; repeat one until it says that nothing is left. The
teacher is trained once; every variant of a seed then begins at the same student and sees the same batches. Variants
are chosen on the validation split with seeds 0-2, and `--confirm` trains SFT, the paper's setting and the best found
with seeds 3-5 and judges them on the test split, which nothing else reads. Results are JSONs in
`eval/results/ten_skills`, the weights are in `runs/ten_skills`. A result of other settings is refused, not replaced.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from eval.ten_skills.bench import TEACHER, Bench, Run
from eval.ten_skills.report import Results, plots, table
from eval.ten_skills.sizes import CONFIRM_SEEDS, SEEDS, SIZES
from eval.ten_skills.variants import PIECES, VARIANTS

HOME = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """A call of `Bench`: its method, its arguments, and the names of the jobs that come before it."""

    call: str
    arguments: tuple
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        shown = [str(argument) for argument in self.arguments if not isinstance(argument, Run)]
        runs = [argument.file.removesuffix(".json") for argument in self.arguments if isinstance(argument, Run)]
        return " ".join([self.call, *shown, *runs])


def jobs_of(runs: Sequence[Run]) -> list[Job]:
    """The runs, and before each what it begins from; the teacher first, since most wait for it."""
    jobs: dict[str, Job] = {}

    def add(job: Job) -> str:
        jobs.setdefault(job.name, job)
        return job.name

    tower = add(Job("tower", ("tower",)))
    teacher = add(Job("teacher", (), (tower,)))
    for run in runs:
        if run.variant == TEACHER:
            add(Job("run", (run,), (teacher,)))
            continue
        variant = VARIANTS[run.variant]
        begins = teacher
        if run.start != TEACHER:
            begins = add(Job("tower", ("narrow" if variant.narrow else "apart",)))
        start = add(Job("start", (run.start, run.seed, variant.narrow), (begins,)))
        needs = (start,) if variant.options is None else (start, teacher)
        add(Job("run", (run,), needs))
    return list(jobs.values())


def work_off(
    jobs: Sequence[Job], submit: Callable[[Job], Future], workers: int, minutes: float | None, say=print
) -> list[Job]:
    """Does the jobs in their order as far as what they need is there, `workers` at a time; returns what is left.

    minutes: a job is begun only where the longest of its kind so far would still end in time.
    """
    waiting, running, done = list(jobs), {}, set()
    begun, longest = time.monotonic(), {}

    def fits(job: Job) -> bool:
        return minutes is None or time.monotonic() - begun + longest.get(job.call, 0.0) < 60 * minutes

    while True:
        for job in list(waiting):
            if len(running) < workers and done.issuperset(job.needs) and fits(job):
                waiting.remove(job)
                started = time.monotonic()
                running[submit(job)] = (job, started)
        if not running:
            return waiting
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, started = running.pop(future)
            result = future.result()
            seconds = time.monotonic() - started
            longest[job.call] = max(longest.get(job.call, 0.0), seconds)
            done.add(job.name)
            if isinstance(result, float):
                say(f"{job.name}: {result:.1f}, {seconds:.0f} s ({len(waiting) + len(running)} jobs left)")


_bench: Bench | None = None


def _open(arguments: tuple, options: dict, threads: int | None) -> None:
    global _bench
    if threads:
        torch.set_num_threads(threads)
    _bench = Bench(*arguments, **options)


def _do(job: Job) -> float | None:
    """Calls the bench of this process; a run gives its average."""
    result = getattr(_bench, job.call)(*job.arguments)
    return result["average"] if job.call == "run" else None


class _Here(Executor):
    """One job at a time, in this process."""

    def submit(self, call, *arguments) -> Future:
        future: Future = Future()
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future


def runs_of(pieces: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """What the pieces ask for on the validation split, the teacher's row included."""
    unknown = [piece for piece in pieces if piece not in PIECES]
    if unknown:
        raise ValueError(f"unknown pieces {unknown}; known are {', '.join(PIECES)}")
    variants = dict.fromkeys(variant for piece in pieces for variant in PIECES[piece])
    runs = [
        Run(variant.name, start, seed, "validation")
        for variant in variants
        for start in variant.starts
        for seed in seeds
    ]
    # What needs no teacher comes first: it is done while the teacher trains.
    runs.sort(key=lambda run: (run.start == TEACHER, VARIANTS[run.variant].options is not None))
    return [Run(TEACHER, "", 0, "validation"), *runs]


def best_runs(results: Results, seeds: Sequence[int]) -> list[Run]:
    """The best found from the teacher's tower too: the last row of the core table."""
    best = results.best_found(seeds)
    return [Run(best, TEACHER, seed, "validation") for seed in seeds] if best else []


def confirm_runs(results: Results, seeds: Sequence[int], confirm_seeds: Sequence[int]) -> list[Run]:
    """SFT at its best rate, the paper's setting and the best found on seeds and a split that chose nothing.

    Raises ValueError where the choice has not been made yet.
    """
    runs = [Run(TEACHER, "", 0, "test")]
    for start in ("apart", TEACHER):
        sft, best = results.best_sft(start, seeds), results.best_found(seeds)
        if sft is None or best is None or not results.rows("switch_kd", start, "validation", seeds):
            raise ValueError("there is nothing to confirm yet: run the core piece first (--pieces core)")
        for name in dict.fromkeys((sft, "switch_kd", best)):
            runs += [Run(name, start, seed, "test") for seed in confirm_seeds]
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.ten_skills", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--pieces", help=f"some of {', '.join(PIECES)}, with commas; left out, all of the size's")
    parser.add_argument("--confirm", action="store_true", help="seeds 3-5 on the test split, after the pieces")
    parser.add_argument("--table", action="store_true", help="no runs, the table and the plots alone")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds 0, 1, 2, and of 3, 4, 5")
    parser.add_argument("--workers", type=int, help="runs at a time, each in a process; 2 on a CPU, 4 on a GPU")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "ten_skills")
    parser.add_argument("--work", type=Path, default=HOME.parent / "runs" / "ten_skills")
    options = parser.parse_args(argv)
    size = SIZES[options.size]
    device = "cuda" if size.name == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available() and not options.table:
        parser.error("--size gpu needs a GPU and torch sees none: run --size cpu")
    cuda = device == "cuda"
    workers = options.workers or (4 if cuda else 2)
    seeds, confirm_seeds = SEEDS[: options.seeds], CONFIRM_SEEDS[: options.seeds]
    bench = (
        (size, options.out, options.work),
        {"device": device, "drawers": 4 if cuda else 1},
    )
    begun = time.monotonic()

    def do(runs: Sequence[Run]) -> bool:
        """Whether all of them are there at the end."""
        here = Bench(*bench[0], **bench[1])
        missing = [run for run in runs if not here.done(run)]
        if not missing:
            return True
        jobs = jobs_of(missing)
        print(f"{len(missing)} of {len(runs)} runs to do, {workers} at a time", flush=True)
        minutes = None if options.minutes is None else options.minutes - (time.monotonic() - begun) / 60
        left = work_off(jobs, lambda job: pool.submit(_do, job), workers, minutes, lambda line: print(line, flush=True))
        left = [job for job in left if job.call == "run"]
        if left:
            print(f"{len(left)} runs are left: give the same command again")
        return not left

    if not options.table:
        pieces = options.pieces.split(",") if options.pieces else size.pieces
        # Everything, where neither pieces nor the confirmation are asked for alone.
        everything = not options.pieces and not options.confirm
        with _pool(workers, *bench, threads=None if cuda else 1) as pool:
            whole = True
            if everything or options.pieces:
                whole = do(runs_of(pieces, seeds)) and do(best_runs(Results.of(options.out, size.name), seeds))
            if whole and (options.confirm or (everything and size.evidence)):
                do(confirm_runs(Results.of(options.out, size.name), seeds, confirm_seeds))
    results = Results.of(options.out, size.name)
    options.out.mkdir(parents=True, exist_ok=True)
    report = table(results, size.name, seeds)
    (options.out / f"{size.name}.md").write_text(report)
    if results.records:
        plots(results, options.out, size.name, seeds)
    print("\n" + report)
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes")


def _pool(workers: int, arguments: tuple, options: dict, threads: int | None) -> Executor:
    if workers == 1:
        _open(arguments, options, None)
        return _Here()
    spawn = get_context("spawn")  # a forked process cannot use a GPU that its parent has seen
    return ProcessPoolExecutor(workers, spawn, initializer=_open, initargs=(arguments, options, threads))


if __name__ == "__main__":
    main()
