"""Starting two processes, as accelerate does."""

import socket


def two_processes() -> list[str]:
    """The module to run and its options; where there is a GPU, ACCELERATE_USE_CPU keeps them off it. Torch 2.2 takes no port 0 for "any"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", f"--main_process_port={port}", "--mixed_precision=no", "--dynamo_backend=no",
    ]  # fmt: skip
