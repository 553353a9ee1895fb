"""Which candidates there are, which pass the gate, and which is taken."""

import time

import numpy as np
import pytest

from services.common.encoders import EncoderOptions
from services.common.encoders.choice import Candidate, Unusable, candidates, choose
from services.common.encoders.golden import agreement
from services.common.encoders.hardware import Processor
from services.common.encoders.trial import TextTrial
from services.common.model_errors import InvalidModel
from services.common.tokens import Tokens

NATIVE = Processor("new", frozenset({"avx512_bf16", "amx_bf16"}))
OLD = Processor("old", frozenset({"avx2"}))
ALL = [Candidate("openvino", "bf16"), Candidate("torch", "bf16"), Candidate("torch", "fp32")]
DIM = 16


class PlainEncoder:
    """Sums a fixed vector a character; *error* is added at random, *pause_s* is how long a batch takes."""

    device = "cpu"

    def __init__(self, error: float = 0.0, pause_s: float = 0.0, raises: bool = False) -> None:
        self.error, self.pause_s, self.raises, self.closed = error, pause_s, raises, False
        self._noise = np.random.default_rng(1)

    def tokenize(self, texts, **_):
        return [Tokens([ord(char) for char in text[:500]] or [0], False) for text in texts]

    def pooled(self, batch):
        if self.raises:
            raise RuntimeError("unknown operation Frobnicate")
        time.sleep(self.pause_s)
        table = np.random.default_rng(0).normal(size=(997, DIM)).astype(np.float32)
        exact = np.stack([table[np.array(item.ids) % 997].mean(axis=0) for item in batch])
        return exact + self.error * self._noise.normal(size=exact.shape).astype(np.float32)

    def close(self):
        self.closed = True


def take(encoders, *, honour=False):
    """Choose among *encoders*, a mapping of candidates."""
    return choose(list(encoders), encoders.__getitem__, TextTrial(PlainEncoder()), honour=honour, measuring_s=0.05)


def names(options: EncoderOptions, device: str, cpu: Processor) -> list[str]:
    """Return what may be tried, in words."""
    return [str(candidate) for candidate in candidates(options, device, cpu)]


def test_the_candidates_are_what_the_machine_computes_itself() -> None:
    """Reduced precision is tried where it is native, both runtimes on a CPU, torch alone elsewhere; int8 never."""
    auto = EncoderOptions()
    assert names(auto, "cpu", NATIVE) == ["openvino bf16", "openvino fp32", "torch bf16", "torch fp32"]
    assert names(auto, "cpu", OLD) == ["openvino fp32", "torch fp32"]
    assert names(auto, "cuda", OLD) == ["torch fp16", "torch bf16", "torch fp32"]
    assert names(auto, "mps", OLD) == ["torch fp16", "torch fp32"]


def test_what_is_asked_for_is_tried_and_nothing_else() -> None:
    """A precision, a runtime or both narrow the candidates; int8 is OpenVINO's."""
    assert names(EncoderOptions(precision="bf16"), "cpu", OLD) == ["openvino bf16", "torch bf16"]
    assert names(EncoderOptions(runtime="torch"), "cpu", NATIVE) == ["torch bf16", "torch fp32"]
    assert names(EncoderOptions(runtime="torch", precision="fp32"), "cpu", NATIVE) == ["torch fp32"]
    assert names(EncoderOptions(precision="int8"), "cpu", OLD) == ["openvino int8"]


@pytest.mark.parametrize(
    ("options", "device"),
    [
        (EncoderOptions(runtime="openvino"), "cuda"),
        (EncoderOptions(runtime="torch", precision="int8"), "cpu"),
        (EncoderOptions(precision="int8"), "cuda"),
    ],
)
def test_what_cannot_work_is_told(options: EncoderOptions, device: str) -> None:
    """A combination that nothing computes is an error that names the runtime needed."""
    with pytest.raises(InvalidModel, match=r"needs the|on the CPU"):
        candidates(options, device, NATIVE)


def test_a_candidate_that_returns_noise_is_refused_and_the_next_is_taken() -> None:
    """However fast it is; the reason names it and its cosine."""
    wrong = PlainEncoder(error=1.0)
    encoders = {ALL[0]: wrong, ALL[2]: PlainEncoder(pause_s=0.002)}
    encoder, choice = take(encoders)
    assert encoder is encoders[ALL[2]]
    assert "openvino bf16 refused: its least cosine" in choice.reason
    assert choice.measured["openvino bf16"]["min_cosine"] < 0.9
    assert "short_text_ms" not in choice.measured["openvino bf16"]
    assert wrong.closed


def test_a_candidate_that_cannot_be_made_is_refused_and_the_next_is_taken() -> None:
    """A runtime that does not know an architecture, at conversion or at the first batch, is said in the reason."""

    def make(candidate: Candidate):
        if candidate == ALL[0]:
            raise Unusable("OpenVINO cannot convert it: no rule for aten::frobnicate")
        return PlainEncoder(raises=candidate == ALL[1])

    _, choice = choose(ALL, make, TextTrial(PlainEncoder()), honour=False, measuring_s=0.01)
    assert (choice.runtime, choice.precision) == ("torch", "fp32")
    assert "aten::frobnicate" in choice.reason
    assert "torch bf16 refused: RuntimeError: unknown operation" in choice.reason


def test_of_those_that_pass_the_faster_is_taken() -> None:
    """Figures of all that were timed are kept; those not taken are closed."""
    encoders = {ALL[0]: PlainEncoder(pause_s=0.02), ALL[2]: PlainEncoder()}
    encoder, choice = take(encoders)
    assert encoder is encoders[ALL[2]]
    assert encoders[ALL[0]].closed
    assert not encoder.closed
    assert set(choice.measured) == {"openvino bf16", "torch fp32"}
    assert all(
        figures["batch_texts_per_s"] > 0 and figures["short_text_ms"] > 0 for figures in choice.measured.values()
    )
    assert "torch fp32 measured fastest" in choice.reason


def test_what_others_do_meanwhile_decides_nothing() -> None:
    """The faster one is taken though two in three of its calls had to wait for the processor."""

    class Disturbed(PlainEncoder):
        calls = 0

        def pooled(self, batch):
            self.calls += 1
            self.pause_s = 0.0 if self.calls % 3 == 0 else 0.03
            return super().pooled(batch)

    _, choice = take({ALL[0]: Disturbed(), ALL[2]: PlainEncoder(pause_s=0.01)})
    assert choice.runtime == "openvino"


def test_torch_weights_stay_fp32_where_reduced_ones_lose_too_much() -> None:
    """Where converted weights miss the bound, torch computes at that precision over fp32 weights, if that passes."""
    autocast = Candidate("torch", "bf16", autocast=True)
    encoders = {ALL[1]: PlainEncoder(error=0.5), autocast: PlainEncoder(), ALL[2]: PlainEncoder(pause_s=0.02)}
    _, choice = choose(
        [ALL[1], ALL[2]], encoders.__getitem__, TextTrial(PlainEncoder()), honour=False, measuring_s=0.01
    )
    assert (choice.precision, choice.autocast) == ("bf16", True)


def test_a_precision_that_was_asked_for_is_honoured_with_its_loss() -> None:
    """Below the bound it is taken all the same, the loss in the figures and a floor for later starts below it."""
    int8 = Candidate("openvino", "int8")
    _, choice = take({int8: PlainEncoder(error=0.05)}, honour=True)
    assert choice.precision == "int8"
    assert choice.measured["openvino int8"]["min_cosine"] < 0.999
    assert f"{choice.measured['openvino int8']['min_cosine']:.5f}" in choice.reason
    assert choice.floor < 0.999


def test_nothing_that_works_is_an_error_with_every_reason() -> None:
    """The message says why each candidate was refused."""
    with pytest.raises(InvalidModel, match=r"openvino bf16 refused.*torch bf16 refused.*torch bf16 autocast refused"):
        take(
            {
                ALL[0]: PlainEncoder(error=1),
                ALL[1]: PlainEncoder(error=1),
                ALL[1]._replace(autocast=True): PlainEncoder(error=1),
            }
        )


def test_vectors_that_are_not_finite_agree_with_nothing() -> None:
    """NaN and zero vectors count as a cosine of 0, so that they never pass."""
    right = np.ones((3, 4), np.float32)
    wrong = np.stack([np.full(4, np.nan), np.zeros(4), np.ones(4)]).astype(np.float32)
    assert agreement(wrong, right).least == 0.0
    assert agreement(right * 7, right).least == pytest.approx(1.0)
