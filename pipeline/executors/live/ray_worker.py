"""The script of a worker process of a Ray that a run starts on this machine. Raylet runs it in place of Ray's own
`setup_worker.py`, which imports Ray and then replaces its process by one that imports Ray again.

It runs Ray's worker in this process. If a worker needs a runtime environment, it runs Ray's own script.
"""

import sys


def main() -> None:
    """The arguments are Ray's script, the path of Ray's worker, and the worker's own arguments."""
    ray_script, *words = sys.argv[1:]
    sys.path[0] = words[0].rpartition("/")[0]  # this file's directory has modules with names of the standard library
    environment, language = "--serialized-runtime-env-context=", "--language="
    plain = all(
        word in (f"{environment}{{}}", f"{language}PYTHON") for word in words if word.startswith((environment, language))
    )
    if not plain or words[0].startswith("-"):
        import os

        os.execv(sys.executable, [sys.executable, ray_script, *words])
    import runpy

    sys.argv = [word for word in words if not word.startswith((environment, language))]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
