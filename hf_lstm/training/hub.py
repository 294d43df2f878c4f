"""What the stock Trainer leaves out when it pushes to the Hub."""

from pathlib import Path

from transformers import TrainerCallback
from transformers.dynamic_module_utils import custom_object_save

from hf_lstm.model.modeling_lstm import LSTMPreTrainedModel


class HubCallback(TrainerCallback):
    """
    Puts the model's code beside its config before each push. In the middle of training Trainer uploads a config that
    names this code, and not the code; nobody could load such a model without hf_lstm.
    """

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero and isinstance(model, LSTMPreTrainedModel):
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            custom_object_save(model, args.output_dir)
            custom_object_save(model.config, args.output_dir)
