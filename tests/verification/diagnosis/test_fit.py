import torch

from verification.diagnosis.fit import allowed_differing, diagnose
from verification.diagnosis.scene import Guess
from verification.replay import Replayed

RIGHT = Replayed(torch.arange(1.0, 2001.0).view(40, 50).bfloat16())
WRONG = (RIGHT.value.float() * 3).bfloat16()


def test_what_is_equal_to_the_bit_is_said_to_be():
    assert diagnose([Guess("thrice", WRONG)], WRONG, RIGHT) == (
        "your output equals thrice (to the bit, 2000 values)"
    )


def test_a_few_values_off_are_counted():
    got = WRONG.clone()
    got[3, 4] *= 1.02

    told = diagnose([Guess("thrice", WRONG)], got, RIGHT)

    assert told is not None and "1999 of 2000 values to the bit" in told


def test_more_values_off_than_chance_puts_there_are_no_fit():
    got = WRONG.clone()
    got[3, :20] *= 1.02

    assert diagnose([Guess("thrice", WRONG)], got, RIGHT) is None


def test_guesses_that_give_the_same_bits_are_all_told():
    told = diagnose([Guess("thrice", WRONG), Guess("3 x", WRONG.clone())], WRONG, RIGHT)

    assert told is not None and told.startswith("your output equals thrice")
    assert told.endswith("on these inputs also 3 x")


def test_the_guess_with_the_fewest_differing_values_comes_first():
    near = WRONG.clone()
    near[0, 0] *= 1.5

    told = diagnose([Guess("nearly thrice", near), Guess("thrice", WRONG)], WRONG, RIGHT)

    assert told is not None and told.startswith("your output equals thrice (to the bit")


def test_a_guess_defined_on_some_rows_says_so_and_one_on_too_few_is_not_tried():
    most, few = torch.arange(40) > 3, torch.arange(40) > 30
    got = WRONG.clone()
    got[:4] = 0

    told = diagnose([Guess("thrice", WRONG, most)], got, RIGHT)

    assert told is not None and "tried on 36 of 40 rows" in told
    assert diagnose([Guess("thrice", WRONG, few)], got, RIGHT) is None


def test_a_right_output_is_not_explained_even_by_a_guess_that_equals_it():
    assert diagnose([Guess("the same", RIGHT.value)], RIGHT.value, RIGHT) is None


def test_a_guess_of_few_values_may_miss_by_chance_and_of_many_by_a_thousandth():
    assert allowed_differing(64) < 5  # one eps fault differs in 5 % of values, 3 of 64
    assert allowed_differing(576) < 0.05 * 576 / 4
    for num_values in (10**5, 10**6, 10**7):
        assert allowed_differing(num_values) == num_values // 1000
    assert all(allowed_differing(n) <= allowed_differing(n + 500) for n in range(0, 20000, 500))
