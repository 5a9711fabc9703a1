"""The command line of torchrun, for engines that start one program on every machine."""

from __future__ import annotations

from mocofast.launch.request import Request


def torchrun(request: Request, address: str, number: str, restarts: int) -> str:
    """Returns the command line, for a shell.

    address: of the first machine, as the shell reads it. The first machine keeps the store through
        which the others find one another.
    number: the variable of the shell with the machine's number. (torchrun alone looks for the
        address among the addresses of the host's name, which may lack the address.)
    restarts: how often torchrun starts the ranks again after a failure.
    """
    options = request.options
    return (
        f"torchrun --nnodes {options.nodes} --nproc-per-node {options.processes} "
        f"--rdzv-backend c10d --rdzv-id {options.name} --rdzv-endpoint {address} "
        f"--rdzv-conf is_host=$(({number} == 0)) "
        f"--max-restarts {restarts} --log-dir logs --tee 3 -m {request.command}"
    )
