"""`python -m switchkd`, the same as `switchkd`; `accelerate launch -m switchkd train CONFIG` starts it on many GPUs."""

from switchkd.cli import main

if __name__ == "__main__":
    main()
