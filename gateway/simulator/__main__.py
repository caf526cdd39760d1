"""``python -m gateway.simulator`` is ``lmstudio-gateway simulate``."""

from gateway.cli import simulate

if __name__ == "__main__":
    simulate(prog_name="python -m gateway.simulator")
