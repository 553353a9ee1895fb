"""
Writes the dashboards as Grafana reads them: `python -m deploy.observability.grafana.dashboards`.

Queries rely on `job`, `instance` and the labels that docs/observability.md names; a test compares them with what real
services export, and the files in `dashboards/` with what the modules beside this one say.
"""

import json
from pathlib import Path

from deploy.observability.grafana.batching import BATCHING
from deploy.observability.grafana.capacity import CAPACITY
from deploy.observability.grafana.overview import OVERVIEW
from deploy.observability.grafana.panels import Dashboard
from deploy.observability.grafana.quality import QUALITY
from deploy.observability.grafana.shards import SHARDS

PLACE = Path(__file__).parent / "dashboards"
ALL = (OVERVIEW, QUALITY, BATCHING, SHARDS, CAPACITY)


def written(dashboard: Dashboard) -> str:
    """Return the text of *dashboard*'s file."""
    return json.dumps(dashboard.as_json(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all dashboards."""
    PLACE.mkdir(exist_ok=True)
    for dashboard in ALL:
        (PLACE / f"{dashboard.uid}.json").write_text(written(dashboard))


if __name__ == "__main__":
    main()
