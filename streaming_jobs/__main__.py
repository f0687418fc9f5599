"""All streaming jobs in one driver, for one machine."""

from engine.driver import command
from streaming_jobs import discovered

if __name__ == "__main__":
    command(discovered())
