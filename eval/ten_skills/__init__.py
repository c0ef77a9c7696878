"""The ten skills: a rendered world, the models and the runs of its table. `python -m eval.ten_skills --help`."""
