"""``python -m gateway.simulator`` is ``lmstudio-gateway simulate``."""

from gateway.commands.main import simulate

if __name__ == "__main__":
    simulate(prog_name="python -m gateway.simulator")
