"""All nightly jobs in one session, in the order of what they read and write."""

from batch_jobs import discovered
from engine.night_run import command

if __name__ == "__main__":
    command(discovered())
