"""``lsm info``."""

from __future__ import annotations

import torch
from rich.table import Table

from .._library import build_info

__all__ = ["info_table"]


def info_table() -> Table:
    """:func:`lsm_cuda.build_info` and the devices, one row each."""
    table = Table(title="lsm-cuda", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in build_info().items():
        if isinstance(value, dict):
            for name, entry in value.items():
                table.add_row(f"{key}: {name}", str(entry))
        elif isinstance(value, list):
            table.add_row(key, ", ".join(map(str, value)) or "none")
        else:
            table.add_row(key, "none" if value is None else str(value))
    table.add_row("cpu threads", str(torch.get_num_threads()))
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("gpus", ", ".join(names) or "none")
    return table
