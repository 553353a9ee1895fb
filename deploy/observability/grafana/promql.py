"""The few shapes of PromQL that the dashboards are made of, over the interval that Grafana chooses."""

OURS = 'job=~"embedding|rerank|search|shard|fallback"'
SEARCHES = (
    'sum(rate(tercet_http_requests_total{job="search",route=~"/search|/search/batch|/msearch"}[$__rate_interval]))'
)


def rate_of(counter: str, by: str = "job", only: str = "") -> str:
    """Return how much a second *counter* rises, by the labels *by*, summed over the series that *only* matches."""
    return f"sum by ({by}) (rate({_selected(counter, only)}[$__rate_interval]))"


def share_of(counter: str, only: str, by: str = "job") -> str:
    """Return the share of *counter*'s rise that the series matching *only* have; no number while it does not rise."""
    return f"{rate_of(counter, by, only)} / {rate_of(counter, by)}"


def quantile(share: float, histogram: str, by: str = "job", only: str = "") -> str:
    """Return a quantile of *histogram*, by the labels *by* (none: of all), of the series that *only* matches."""
    return f"histogram_quantile({share}, {rate_of(f'{histogram}_bucket', f'{by}, le' if by else 'le', only)})"


def mean(histogram: str, by: str = "job", only: str = "") -> str:
    """Return the mean of what *histogram* observed."""
    return f"{rate_of(f'{histogram}_sum', by, only)} / {rate_of(f'{histogram}_count', by, only)}"


def _selected(metric: str, only: str) -> str:
    return f"{metric}{{{only}}}" if only else metric
