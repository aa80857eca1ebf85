"""Entry of a device process: reads its order from stdin, says where it listens, serves until stdin closes."""

from __future__ import annotations

import json
import os
import sys
import threading


def main() -> None:
    """Serve one device. The end of stdin means that the parent is gone: then this process ends at once."""
    order = json.loads(sys.stdin.readline())

    def leave_with_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=leave_with_parent, daemon=True).start()  # before the slow imports: a parent may not wait
    import torch

    from splitray.runtime.device.shard_host import ShardHost

    torch.set_num_threads(order["threads"])
    host = ShardHost(order["device"], token=bytes.fromhex(order["token"]), host=order["host"],
                     deadline_s=order["deadline_s"])  # fmt: skip
    sys.stdout.write(json.dumps([host.endpoint.unix, host.endpoint.host, host.endpoint.port]) + "\n")
    sys.stdout.flush()

    host.serve()


if __name__ == "__main__":
    main()
