"""Runs on a spot node beside Ray: drains the node when the cloud announces that it takes the node away.

The rows in flight finish. Other nodes process the remaining rows.

    python jobs/spot_notice.py [--metadata URL] [arguments of `ray drain-node`]

AWS announces it two minutes before (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html),
Google Cloud half a minute before (https://cloud.google.com/compute/docs/instances/spot#preemption-process).
On Kubernetes the kubelet drains nodes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

METADATA = "http://169.254.169.254"
LOOK_S = 5.0


def notice(metadata: str) -> int | None:
    """The seconds until the node goes away; None if there is no notice."""
    try:
        token = _ask(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
        _ask(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
        return 110
    except OSError:  # no notice (404), or not AWS
        pass
    try:
        preempted = _ask(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return 25 if preempted.strip().upper() == "TRUE" else None
    except OSError:
        return None


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=2) as answer:
        text: str = answer.read().decode()
        return text


def main() -> None:
    """Waits for the notice, then runs `ray drain-node` and exits with its status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metadata", default=METADATA)
    args, more = parser.parse_known_args()
    while (left := notice(args.metadata)) is None:
        time.sleep(LOOK_S)
    command = [
        str(Path(sys.executable).with_name("ray")), "drain-node", "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=spot notice", f"--deadline-remaining-seconds={left}", *more,
    ]  # fmt: skip
    raise SystemExit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
