"""``python -m gateway`` is ``lmstudio-gateway``."""

from gateway.commands import main

if __name__ == "__main__":
    main(prog_name="python -m gateway")
