"""Is studies.scaling now."""

from benchmarks import moved

if __name__ == "__main__":
    moved.run("benchmarks.scaling")
