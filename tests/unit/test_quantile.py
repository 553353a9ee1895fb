"""The rolling quantile."""

from services.common.quantile import RollingQuantile


def test_too_few_samples_say_nothing() -> None:
    """There is no value until there are enough."""
    rolling = RollingQuantile(0.95, least=4)
    for sample in (1.0, 2.0, 3.0):
        rolling.note(sample)
        assert rolling.value is None
    rolling.note(4.0)
    assert rolling.value == 4.0


def test_it_is_the_quantile_of_the_latest() -> None:
    """Old samples are forgotten."""
    rolling = RollingQuantile(0.5, window=10, refresh=1, least=1)
    for sample in range(100):
        rolling.note(float(sample))
    assert rolling.value == 95.0
    for _ in range(10):
        rolling.note(1.0)
    assert rolling.value == 1.0
