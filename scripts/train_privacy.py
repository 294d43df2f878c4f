"""Arguments of train.py for private training."""

from dataclasses import dataclass, field


@dataclass
class PrivacyArguments:
    """Differential privacy of each document (DP-SGD); needs `--batching padded` and opacus."""

    dp_epsilon: float | None = field(
        default=None, metadata={"help": "Epsilon that the run may spend: 8; `inf` clips and adds no noise."}
    )
    dp_delta: float = field(
        default=1e-5, metadata={"help": "Delta: less than one divided by the number of documents."}
    )
    dp_clip: float = field(default=1.0, metadata={"help": "Largest norm of the gradient of a document."})

    def check(self, data_args, args) -> None:
        """Refuse what cannot be private, and set what private training needs."""
        if self.dp_epsilon is None:
            return
        if data_args.batching != "padded":
            reason = {"lanes": "carries a state from document to document", "packed": "mixes documents in a row"}
            raise ValueError(
                f"`--batching` {data_args.batching} {reason[data_args.batching]}, and `--dp_epsilon` protects single "
                "documents: add `--batching padded`."
            )
        args.max_grad_norm = 0.0  # each document is clipped instead
