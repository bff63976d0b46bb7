"""What a ratio of speeds rests on: both sides compute the same."""
import numpy as np

import bench
import verification


def test_the_plain_loop_and_the_histogram_give_the_same_folds():
    rng = np.random.default_rng(0)
    same = np.resize(np.r_[np.ones(30, bool), np.zeros(30, bool)], 600)
    distance = np.where(same, rng.normal(1, 0.4, 600), rng.normal(1.8, 0.4, 600)).clip(0, 4)
    np.testing.assert_array_equal(bench.loop_accuracies(distance, same),
                                  verification.fold_accuracies(distance, same))
