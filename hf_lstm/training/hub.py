"""What the stock Trainer leaves out when it pushes to the Hub."""

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
            custom_object_save(model, args.output_dir)  # and what its code imports, the config's too
