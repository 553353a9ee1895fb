"""`tercet audit`: do the shards hold what the ledger says."""

from typing import Annotated

import typer

from tercet.commands import ApiKey, Url
from tercet.commands.collections import Name, ask
from tercet.console import say

_SHOWN = 5


def audit(
    collection: Name,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what differs, while searches go on.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Compare every shard on every host with the ledger; exit status 1 if one differs and was not mended."""
    found = ask(url, api_key, lambda client: client.audit(collection, repair=repair))
    unmended = False
    for host, shards in found.hosts.items():
        for shard in shards:
            wrong = {kind: ids for kind, ids in shard.differences.items() if ids}
            count = sum(map(len, wrong.values()))
            unmended |= count > shard.repaired
            mended = f", {shard.repaired} mended" if shard.repaired else ""
            said = f"{count} differences{mended}" if wrong else "as the ledger says"
            say(f"{host}, shard {shard.shard}: {shard.documents} documents, {said}", "yellow" if wrong else "green")
            for kind, ids in wrong.items():
                more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
                say(f"  {kind}: {', '.join(ids[:_SHOWN])}{more}")
    if unmended:
        raise typer.Exit(1)
