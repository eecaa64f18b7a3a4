"""The laws that every observer and every spec obeys, as code that anyone can run on their own.

    from functional_sq.testing import check_convolution_backend, check_observer, check_product_backend
    check_observer(MyObserver())        # None, or one AssertionError with the smallest example of each failure
    check_product_backend(my_kernels)           # the same for a backend of functional_sq.backends
    check_convolution_backend(my_kernels)

A law is a function of a spec and of tensors that raises AssertionError, with the expression and the
values, where it does not hold. `LAWS` pairs each with the strategy of its arguments. Laws compare
bits: a NaN equals a NaN, 0.0 differs from -0.0. What has to be left out is said, with the
reason, in the docstring of the law.

Needs hypothesis: `pip install hypothesis`.
"""

from functional_sq.testing.assertions import assert_same_bits
from functional_sq.testing.backend_laws import convolution_is_exact, product_is_exact
from functional_sq.testing.backend_suite import check_convolution_backend, check_product_backend
from functional_sq.testing.code_laws import (
    a_constant_is_represented,
    codes_in_range_idempotent_monotone,
    each_block_is_represented,
    granularities_agree,
    scale_equivariance,
    zero_is_exact,
)
from functional_sq.testing.law import Law, check_law
from functional_sq.testing.observer_suite import LAWS, check_observer
from functional_sq.testing.state_laws import (
    compiled_equals_eager,
    large_is_its_pieces,
    masked_values_do_not_count,
    merge_is_a_commutative_monoid,
    observe_is_a_homomorphism,
    observe_is_pure,
    qparams_ignore_splits,
    round_trips,
    unfit_states_are_faulty,
    vmap_equals_loop,
)
from functional_sq.testing.strategies import cases, granularities, shapes, specs, tensors

__all__ = [
    "LAWS",
    "Law",
    "a_constant_is_represented",
    "assert_same_bits",
    "cases",
    "check_convolution_backend",
    "check_law",
    "check_observer",
    "check_product_backend",
    "codes_in_range_idempotent_monotone",
    "compiled_equals_eager",
    "convolution_is_exact",
    "each_block_is_represented",
    "granularities",
    "granularities_agree",
    "large_is_its_pieces",
    "masked_values_do_not_count",
    "merge_is_a_commutative_monoid",
    "observe_is_a_homomorphism",
    "observe_is_pure",
    "product_is_exact",
    "qparams_ignore_splits",
    "round_trips",
    "scale_equivariance",
    "shapes",
    "specs",
    "tensors",
    "unfit_states_are_faulty",
    "vmap_equals_loop",
    "zero_is_exact",
]
