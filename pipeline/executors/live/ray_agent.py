"""The script that stands in for an agent of a Ray that a run starts on this machine. It starts in 10 ms. An agent needs a
second, and raylet waits for it.

    ray_agent.py ADDRESS PORT_FILE COMMAND…   it runs COMMAND, the agent, when Ray first connects to the agent's port
    ray_agent.py SESSION                      the agent does nothing in such a Ray; SESSION only marks the process

It ends with raylet, which holds the other end of its standard input.
"""

import os
import sys

sys.path.pop(0)  # this file's directory has modules with names of the standard library


def main() -> None:
    waits = [0] if is_pipe(0) else []
    server = None
    if len(sys.argv) > 2:
        import socket

        address, port_file, *command = sys.argv[1:]
        server = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        port = server.getsockname()[1]
        with open(f"{port_file}.new", "w") as file:  # noqa: PTH123  # pathlib would be half of the time
            file.write(str(port))
        os.rename(f"{port_file}.new", port_file)  # noqa: PTH104
        waits.append(server.fileno())
    parent = os.getppid()
    import select

    ready: list[int] = []
    while not ready and os.getppid() == parent:
        ready = select.select(waits, [], [], 5.0)[0]
    if server is not None and server.fileno() in ready:
        server.close()  # Ray connects again, until the agent answers
        os.execv(command[0], [*command, f"--runtime-env-agent-port={port}"])


def is_pipe(number: int) -> bool:
    import stat

    return stat.S_ISFIFO(os.fstat(number).st_mode)


if __name__ == "__main__":
    main()
