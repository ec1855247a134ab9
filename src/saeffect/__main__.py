"""`python -m saeffect` is the command line."""

from saeffect.cli.app import main

if __name__ == "__main__":
    main()
