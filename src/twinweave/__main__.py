"""`python -m twinweave` is the command line, also for launchers such as `accelerate launch -m twinweave`."""

from .cli import main

if __name__ == "__main__":
    main()
