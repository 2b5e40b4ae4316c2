"""`python -m perfmodel` is the command line."""

from perfmodel.cli import main

if __name__ == "__main__":
    main()
