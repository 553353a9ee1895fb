"""What a dashboard is made of, and how Grafana writes it: dashboards.py says what is on them, in these terms."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

GRID_COLUMNS = 24
SCHEMA_VERSION = 39  # Of Grafana 11; later ones read it and bring it up to date.
DATASOURCE: Mapping[str, str] = {"type": "prometheus", "uid": "${datasource}"}

Kind = Literal["timeseries", "stat", "bargauge"]


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression; *legend* names its series by their labels, as in `{{job}}`."""

    expr: str
    legend: str = "__auto"


@dataclass(frozen=True, slots=True)
class Panel:
    """
    One picture. *unit* is Grafana's name of a unit (`s`, `reqps`, `percentunit`, `bytes`, `short`).

    *bad_from* (or *bad_below*) is where a value is drawn in red; *whole* stacks the series, which are parts of something.
    """

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    about: str = ""
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 7
    bad_from: float | None = None
    bad_below: float | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading, from left to right and on in the next line."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page. *uid* is its address and the name of its file."""

    uid: str
    title: str
    about: str
    rows: Sequence[Row]

    def panels(self) -> Iterator[Panel]:
        """Yield all panels in their order."""
        for row in self.rows:
            yield from row.panels

    def as_json(self) -> dict[str, Any]:
        """Return what Grafana loads."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.about,
            "tags": ["tercet"],
            "schemaVersion": SCHEMA_VERSION,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "templating": {
                "list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}]
            },
            "annotations": {"list": [_firing_alerts()]},
            "links": [
                {"type": "dashboards", "title": "Tercet", "tags": ["tercet"], "asDropdown": True, "keepTime": True}
            ],
            "panels": list(self._placed()),
        }

    def _placed(self) -> Iterator[dict[str, Any]]:
        number = top = 0
        for row in self.rows:
            number += 1
            place = {"x": 0, "y": top, "w": GRID_COLUMNS, "h": 1}
            yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
            top += 1
            left = height = 0
            for panel in row.panels:
                if left + panel.width > GRID_COLUMNS:
                    top, left, height = top + height, 0, 0
                number += 1
                place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
                yield {"id": number, "gridPos": place, **_drawn(panel)}
                left, height = left + panel.width, max(height, panel.height)
            top += height


def _drawn(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.bad_from is not None:
        steps.append({"color": "red", "value": panel.bad_from})
    if panel.bad_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.bad_below}]
    marked = panel.bad_from is not None or panel.bad_below is not None
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.kind == "timeseries":
        defaults["min"] = 0
        defaults["custom"] = {
            "fillOpacity": 30 if panel.whole else 8,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.whole else "none"},
            "thresholdsStyle": {"mode": "dashed" if marked else "off"},
        }
    targets = [
        {"refId": chr(ord("A") + n), "datasource": DATASOURCE, "expr": query.expr, "legendFormat": query.legend}
        for n, query in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": targets,
    }


_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: Mapping[Kind, Mapping[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": _LAST, "colorMode": "value", "graphMode": "area", "textMode": "auto"},
    "bargauge": {"reduceOptions": _LAST, "orientation": "horizontal", "displayMode": "basic"},
}


def _firing_alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{job}} {{instance}}",
    }
