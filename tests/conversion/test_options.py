import argparse
from dataclasses import asdict

from conversion.options import Options, add_options, from_arguments, from_record


def test_arguments_default_to_the_options_defaults():
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert from_arguments(parser.parse_args([])) == Options()
    words = "--dataset photos --fp8-recipe rowwise --reparameterization paper --keep-bf16 AUTO --export torchao"
    options = from_arguments(parser.parse_args(words.split()))
    assert (options.calibration_dataset, options.fp8_recipe) == ("photos", "rowwise")
    assert (options.reparameterization, options.keep_bf16, options.exports) == ("paper", ("auto",), ("torchao",))


def test_request_of_a_run_is_read():
    options = Options(num_batches=3, amax_statistic="mse")
    assert from_record(asdict(options)) == options


def test_request_of_a_run_of_an_earlier_version_is_read():
    earlier = {
        "stage": 2,
        "way": "paper",
        "recipe": "rowwise",
        "data": "photos",
        "base_image_size": 16,
        "batches": 3,
        "batch": 5,
        "statistic": "mse",
        "history": 7,
    }
    assert from_record(earlier) == Options(
        reparameterization="paper",
        fp8_recipe="rowwise",
        calibration_dataset="photos",
        base_latent_size=16,
        num_batches=3,
        batch_size=5,
        amax_statistic="mse",
        amax_history_len=7,
    )
