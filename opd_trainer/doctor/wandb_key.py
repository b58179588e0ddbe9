"""Whether wandb would find a key, without asking wandb, whose import takes its time, or its server."""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

SERVER = "https://api.wandb.ai"


def wandb_key(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> str | None:
    """Where the key is, as wandb looks for it: WANDB_API_KEY, then the netrc file; None where it is nowhere."""
    if environment.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    host = urlsplit(environment.get("WANDB_BASE_URL", SERVER)).hostname or ""
    folder = home or Path.home()
    named = environment.get("NETRC")
    for file in [Path(named)] if named else [folder / ".netrc", folder / "_netrc"]:
        try:
            known = netrc.netrc(str(file)).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        if host in known:
            return str(file)
    return None
