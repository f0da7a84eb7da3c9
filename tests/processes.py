"""Starting processes: two, as accelerate does, and on which port."""

import socket


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_processes() -> list[str]:
    """The module to run and its options; where there is a GPU, ACCELERATE_USE_CPU keeps them off it. Torch 2.2 takes no port 0 for "any"."""
    return [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", f"--main_process_port={free_port()}", "--mixed_precision=no", "--dynamo_backend=no",
    ]  # fmt: skip
