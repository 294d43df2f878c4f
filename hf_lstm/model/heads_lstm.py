"""Heads for classification: of a text, or of each of its tokens.

    y = W pool(h_1 ... h_T) + b    pool: the last output, the largest, the mean, or all three
                                   (concat pooling of ULMFiT: Howard & Ruder 2018, section 3.3)

With `classifier_hidden_size` ULMFiT's block comes before W: batch norm (Ioffe & Szegedy 2015), dropout, a linear layer, ReLU.

Shapes: B batch, T tokens of this call, D width of `last_hidden_state` (`config.output_size`), C labels.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .cells_lstm import is_traced
from .configuration_lstm import LSTMConfig
from .modeling_lstm import LSTMModel, LSTMPreTrainedModel, linear


class ClassificationHead(nn.Module):
    """The output layer of a classifier, after ULMFiT's block where the config asks for it."""

    def __init__(self, config: LSTMConfig, width: int):
        super().__init__()
        self.config, self.norm, self.dense = config, None, None
        if (hidden_size := config.classifier_hidden_size) is not None:
            self.norm, self.dense = nn.BatchNorm1d(width), linear(width, hidden_size, bias=True)
            width = hidden_size
        self.out_proj = linear(width, cast(int, config.num_labels), bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Compute logits: `(N, width)` to `(N, C)`.

        Raises:
            ValueError: for a single row while training with batch norm, which needs the statistics of several.
        """
        if self.norm is not None:
            if self.training and len(x) < 2:
                raise ValueError(
                    f"The batch has {len(x)} rows, and batch norm (`classifier_hidden_size`) learns from at least 2: raise "
                    "`per_device_train_batch_size`, or set `dataloader_drop_last=True`."
                )
            x = self.norm(x)
        x = F.dropout(x, self.config.output_dropout, self.training)
        return self.out_proj(x if self.dense is None else F.relu(self.dense(x)))


class LSTMForSequenceClassification(LSTMPreTrainedModel):
    """[`LSTMModel`] with a classifier of the text, on the outputs that `config.classifier_pooling` chooses."""

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LSTMModel(config)
        self.score = ClassificationHead(
            config, config.output_size * (3 if config.classifier_pooling == "concat" else 1)
        )
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]  # `TransformersKwargs` names `position_ids` too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        Args:
            input_ids, position_ids, past_key_values, inputs_embeds, use_cache:
                See [`LSTMModel`]. The outputs of this call are pooled.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                See [`LSTMModel`]. Without one, `config.pad_token_id` is padding at the start and at the end of a row, and a
                token of the text elsewhere.
            labels (`torch.Tensor` of shape `(B,)` or `(B, C)`, *optional*):
                The class of each text, from 0; -100 for those without one. With a single label, or with labels of a floating
                type, see `config.problem_type`.

        Returns:
            [`~modeling_outputs.SequenceClassifierOutputWithPast`]: `logits` of shape `(B, C)`; `loss`, for classes in nats, 0
            where no text has one.

        Raises:
            ValueError: if a row holds no token, for a label that is not a class, or as for [`LSTMModel`].
        """
        attention_mask = mask_of(self.config, input_ids, attention_mask)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(pool(outputs.last_hidden_state, attention_mask, self.config.classifier_pooling))
        loss = None
        if labels is not None:
            count = divisor = kwargs.get("num_items_in_batch")
            usual = None if self.num_labels == 1 else "single_label_classification"
            is_class = (self.config.problem_type or usual) == "single_label_classification"
            if is_class and not labels.is_floating_point():
                labels, divisor = checked_labels(labels, logits.shape[-1], count)
            options = {"pooled_logits": logits, "config": self.config, "num_items_in_batch": divisor}
            loss = self.loss_function(logits=logits, labels=labels, **options)
            if count is not None and self.config.problem_type != "single_label_classification":
                loss = loss * labels.numel() / count  # transformers divides the loss of classes alone by the count
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LSTMForTokenClassification(LSTMPreTrainedModel):
    """[`LSTMModel`] with a classifier of each token, which knows the tokens before it."""

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LSTMModel(config)
        self.score = ClassificationHead(config, config.output_size)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]  # `TransformersKwargs` names `position_ids` too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        r"""
        Args:
            input_ids, position_ids, past_key_values, inputs_embeds, use_cache: See [`LSTMModel`].
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): See [`LSTMForSequenceClassification`].
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): The class of each token; -100 for those without one.

        Returns:
            [`~modeling_outputs.TokenClassifierOutput`]: `logits` of shape `(B, T, C)`, at padding those of the token before
            it, and while training with batch norm 0; `loss` in nats, 0 where no token has a class.

        Raises:
            ValueError: if a row holds no token, for a label that is not a class, or as for [`LSTMModel`].
        """
        attention_mask = mask_of(self.config, input_ids, attention_mask)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if self.training and self.score.norm is not None:  # statistics of the tokens alone
            real = real_tokens(hidden, attention_mask)
            scores = self.score(hidden[real])
            logits = scores.new_zeros(*hidden.shape[:2], self.num_labels).masked_scatter(real[..., None], scores)
        else:
            logits = self.score(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        loss = None
        if labels is not None:
            classes, count = checked_labels(labels, logits.shape[-1], kwargs.get("num_items_in_batch"))
            loss = self.loss_function(logits, classes, self.config, num_items_in_batch=count)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def checked_labels(
    labels: torch.Tensor, num_labels: int, count: torch.Tensor | int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return labels of classes, and what the sum of their losses is divided by: `count`, or else the number of those that are
    not -100, and at least 1.

    Raises:
        ValueError: for a label that is neither a class nor -100.
    """
    labels = labels.long()
    if not is_traced():
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= num_labels))]
        if len(wrong):
            raise ValueError(
                f"`labels` hold {int(wrong[0])}, and the {num_labels} classes are numbered from 0 to {num_labels - 1}: number "
                "them anew, write -100 where a class is missing, or make the model with a larger `num_labels`."
            )
    if count is None:
        count = (labels != -100).sum()
    return labels, torch.as_tensor(count).clamp(min=1)


def mask_of(config: LSTMConfig, input_ids: Any, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """
    Return the mask `(B, T)`: where none is given, 0 in the runs of the pad id at the start and at the end of each row.

    Raises:
        ValueError: if a row holds no token.
    """
    if attention_mask is None and input_ids is not None and config.pad_token_id is not None:
        is_pad = (input_ids == config.pad_token_id).int()
        leading, trailing = is_pad.cumprod(dim=1), is_pad.flip(1).cumprod(dim=1).flip(1)
        attention_mask = 1 - (leading | trailing)
    if attention_mask is not None and not (rows := (attention_mask != 0).flatten(1).any(dim=1)).all():
        raise ValueError(
            f"Row {int(rows.int().argmin())} of the batch holds no token, only padding: leave texts without a token out."
        )
    return attention_mask


def real_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return which of the outputs `(B, T, D)` are those of tokens, `(B, T)`."""
    if attention_mask is None:
        return hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    return (attention_mask[:, -hidden.shape[1] :] != 0).to(hidden.device)


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Pool the outputs of each row's tokens: `(B, T, D)` to `(B, D)`, or to `(B, 3 D)` for `"concat"`."""
    last = hidden[:, -1]  # padding repeats the output before it
    if pooling == "last":
        return last
    real = real_tokens(hidden, attention_mask)[..., None]
    pooled = {
        "max": hidden.masked_fill(~real, -torch.inf).amax(dim=1),
        "mean": (hidden * real).sum(dim=1) / real.sum(dim=1),
    }
    return torch.cat([last, *pooled.values()], dim=-1) if pooling == "concat" else pooled[pooling]


__all__ = ["LSTMForSequenceClassification", "LSTMForTokenClassification"]
