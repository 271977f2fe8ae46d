import pytest

from engine.sources.shape import CONFIG
from tests.benchmarks.points import POINTS, Limits, Point, floor_ms, layer_weights

MEASURED = Limits(read=4.51e12, multiply=787e12)
WEIGHTS = 1_235_814_400  # of Llama 3.2 1B, norms included


def test_the_matrices_of_the_model_are_counted():
    matrices = 16 * layer_weights(CONFIG) + 128_256 * 2048

    assert WEIGHTS - matrices == 33 * 2048  # its norms


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        (Point("decode", 1, 0, 0), 0.548),
        (Point("decode", 1, 16_384, 0), 0.667),
        (Point("decode", 256, 1024, 0), 2.453),
        (Point("prefill", 1, 512, 0), 1.29),
        (Point("prefill", 1, 8192, 0), 25.8),
    ],
)
def test_floors_are_those_of_a_hand_calculation(point: Point, expected: float):
    assert floor_ms(point, CONFIG, MEASURED) == pytest.approx(expected, rel=0.01)


def test_every_point_has_its_own_name_and_room_for_its_steps():
    assert len({point.name for point in POINTS}) == len(POINTS)
    assert all(point.context + point.steps <= CONFIG.max_position_embeddings for point in POINTS)
