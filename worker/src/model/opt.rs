//! OPT: learned positions, layer norm, a plain feed-forward. Source: Zhang et al., arXiv 2205.01068.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::checkpoint::Checkpoint;
use espalier_common::ids::LayerIndex;
use espalier_common::outline::LayerOutline;
use espalier_common::structure::{AttentionUnit, HeadCounts, LayerStructure, Structure};

use super::attention::Attention;
use super::blocks::{Linear, Norm, join};
use super::config::Config;
use super::load::{Expected, LinearSpec, Loader};
use super::structure::{Coupled, Heads, parameters};
use super::{Activation, Anatomy, Carry, Decoder, DecoderLayer, Head, ModelError, ModelFamily, anatomy};

/// OPT, 125m to 66b.
pub(super) const FAMILY: ModelFamily = ModelFamily {
    name: "opt",
    architectures: &["OPTForCausalLM"],
    open: |checkpoint, device| Ok(Box::new(OptDecoder::open(checkpoint, device)?)),
};

const EMBEDDING: &str = "model.decoder.embed_tokens.weight";
const POSITIONS: &str = "model.decoder.embed_positions.weight";
const FINAL_NORM: &str = "model.decoder.final_layer_norm";
const HEAD: &str = "lm_head.weight";
const EPSILON: f64 = 1e-5;

/// Rows of the position table that no token uses: the authors' code numbered positions from the padding index on.
const POSITION_OFFSET: usize = 2;

struct OptDecoder {
    loader: Loader,
    layers: usize,
    hidden: usize,
    ffn: usize,
    vocabulary: usize,
    heads: usize,
    max_positions: usize,
    activation: Activation,
    norm_first: bool,
    final_norm: bool,
    bias: bool,
    affine: bool,
    tied: bool,
    /// Width of the token embedding; 350m projects it to the hidden size and back.
    embedding_width: usize,
}

impl OptDecoder {
    fn open(checkpoint: Arc<dyn Checkpoint>, device: &Device) -> Result<Self, ModelError> {
        let path = checkpoint.path().display().to_string();
        let config = Config::new(&path, checkpoint.config());
        let activation = match config.text("activation_function")?.unwrap_or("relu") {
            "relu" => Activation::Relu,
            "gelu" => Activation::Gelu,
            other => return Err(config.refuse("activation_function", format!("{other} is neither relu nor gelu"))),
        };
        let hidden = config.dimension("hidden_size")?;
        let heads = config.dimension("num_attention_heads")?;
        config.head_width(hidden, heads)?;
        let norm_first = config.flag("do_layer_norm_before", true)?;
        let decoder = Self {
            layers: config.layers()?,
            hidden,
            ffn: config.dimension("ffn_dim")?,
            vocabulary: config.dimension("vocab_size")?,
            heads,
            max_positions: config.dimension("max_position_embeddings")?,
            activation,
            norm_first,
            final_norm: norm_first && !config.flag("_remove_final_layer_norm", false)?,
            bias: config.flag("enable_bias", true)?,
            affine: config.flag("layer_norm_elementwise_affine", true)?,
            tied: config.flag("tie_word_embeddings", true)?,
            embedding_width: config.dimension_if_any("word_embed_proj_dim")?.unwrap_or(hidden),
            loader: Loader::new(checkpoint.clone(), device),
        };
        decoder.loader.expect(EMBEDDING, &decoder.embedding_shape())?;
        decoder.loader.expect(decoder.head_name(), &decoder.embedding_shape())?;
        decoder.loader.expect(POSITIONS, &decoder.positions_shape())?;
        for projection in [decoder.project_in(), decoder.project_out()].iter().flatten() {
            decoder.loader.expect(&format!("{}.weight", projection.name), &[projection.rows, projection.columns])?;
        }
        if decoder.final_norm {
            for (name, shape) in decoder.norm_tensors(FINAL_NORM) {
                decoder.loader.expect(&name, &shape)?;
            }
        }
        Ok(decoder)
    }

    fn embedding_shape(&self) -> [usize; 2] {
        [self.vocabulary, self.embedding_width]
    }

    fn positions_shape(&self) -> [usize; 2] {
        [self.max_positions + POSITION_OFFSET, self.hidden]
    }

    fn head_name(&self) -> &'static str {
        if self.tied { EMBEDDING } else { HEAD }
    }

    fn project_in(&self) -> Option<LinearSpec> {
        self.projection("model.decoder.project_in", self.hidden, self.embedding_width)
    }

    fn project_out(&self) -> Option<LinearSpec> {
        self.projection("model.decoder.project_out", self.embedding_width, self.hidden)
    }

    fn projection(&self, name: &str, rows: usize, columns: usize) -> Option<LinearSpec> {
        (rows != columns).then(|| LinearSpec { name: name.to_owned(), rows, columns, bias: false })
    }

    /// The linear maps of a layer: q, k, v → out_proj → fc1 → fc2.
    fn groups(&self, layer: LayerIndex) -> Vec<Vec<LinearSpec>> {
        let linear = |name: &str, rows, columns| LinearSpec {
            name: format!("model.decoder.layers.{layer}.{name}"),
            rows,
            columns,
            bias: self.bias,
        };
        let square = |name: &str| linear(name, self.hidden, self.hidden);
        vec![
            vec![square("self_attn.q_proj"), square("self_attn.k_proj"), square("self_attn.v_proj")],
            vec![square("self_attn.out_proj")],
            vec![linear("fc1", self.ffn, self.hidden)],
            vec![linear("fc2", self.hidden, self.ffn)],
        ]
    }

    /// The norms of a layer, attention's first.
    fn norms(&self, layer: LayerIndex) -> [String; 2] {
        ["self_attn_layer_norm", "final_layer_norm"].map(|name| format!("model.decoder.layers.{layer}.{name}"))
    }

    /// Weight and bias of a norm, if norms have any.
    fn norm_tensors(&self, name: &str) -> Vec<Expected> {
        let tensor = |part: &str| (format!("{name}.{part}"), vec![self.hidden]);
        if self.affine { vec![tensor("weight"), tensor("bias")] } else { Vec::new() }
    }

    fn load_norm(&self, name: &str) -> Result<Norm, ModelError> {
        let (weight, bias) = match self.norm_tensors(name).as_slice() {
            [(weight, shape), (bias, _)] => (self.loader.tensor(weight, shape)?, self.loader.tensor(bias, shape)?),
            _ => {
                let weight = Tensor::ones(self.hidden, candle_core::DType::F32, self.loader.device())?;
                let bias = weight.zeros_like()?;
                (weight, bias)
            }
        };
        Ok(Norm::Layer { weight, bias, epsilon: EPSILON })
    }
}

impl Decoder for OptDecoder {
    fn family(&self) -> &'static str {
        FAMILY.name
    }

    fn layers(&self) -> usize {
        self.layers
    }

    fn hidden_size(&self) -> usize {
        self.hidden
    }

    fn vocabulary_size(&self) -> usize {
        self.vocabulary
    }

    fn max_sequence_length(&self) -> Option<usize> {
        Some(self.max_positions)
    }

    fn outline(&self, layer: LayerIndex) -> Result<LayerOutline, ModelError> {
        let norms: Vec<Expected> = self.norms(layer).iter().flat_map(|name| self.norm_tensors(name)).collect();
        self.loader.outline(&self.groups(layer), &norms)
    }

    fn structure(&self, unit: AttentionUnit) -> Structure {
        let layers = (0..self.layers).map(|layer| {
            let groups = self.groups(LayerIndex(layer as u32));
            let channels = Coupled {
                producers: vec![(&groups[2][0], 1)],
                consumer: &groups[3][0],
                blocks: self.ffn,
                stride: 1,
                runs: 1,
                config: &[("ffn_dim", 1)],
            };
            // Its config has no head width but hidden / heads: with fewer heads no stock loader takes it.
            let attention = (unit == AttentionUnit::Channels).then(|| {
                let heads = Heads { queries: 1, kv_heads: self.heads, head_dim: self.hidden / self.heads };
                heads.pair(&groups, unit)
            });
            LayerStructure { parameters: parameters(&groups), attention, channels: channels.pair() }
        });
        Structure {
            explicit: BTreeMap::new(),
            layers: layers.collect(),
            uneven: None,
            only_masks: false,
            heads: Some(HeadCounts { query: self.heads, kv: self.heads }),
        }
    }

    fn device(&self) -> &Device {
        self.loader.device()
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor, ModelError> {
        if tokens.len() > self.max_positions {
            return Err(ModelError::SequenceTooLong { tokens: tokens.len(), limit: self.max_positions });
        }
        let mut embedded = self.loader.embedding(EMBEDDING, self.embedding_shape(), tokens)?;
        if let Some(projection) = self.project_in() {
            embedded = self.loader.linear(&projection)?.forward(&embedded)?;
        }
        let positions = POSITION_OFFSET..POSITION_OFFSET + tokens.len();
        Ok((embedded + self.loader.rows(POSITIONS, self.positions_shape(), positions)?)?)
    }

    fn load_layer(&self, layer: LayerIndex) -> Result<Box<dyn DecoderLayer>, ModelError> {
        let [attention_norm, ffn_norm] = self.norms(layer);
        Ok(Box::new(OptLayer {
            groups: self.loader.linears(&self.groups(layer))?,
            attention_norm: self.load_norm(&attention_norm)?,
            ffn_norm: self.load_norm(&ffn_norm)?,
            norm_first: self.norm_first,
            attention: Attention {
                heads: self.heads,
                kv_heads: self.heads,
                head_dim: self.hidden / self.heads,
                window: None,
            },
            activation: self.activation,
        }))
    }

    fn load_head(&self) -> Result<Box<dyn Head>, ModelError> {
        Ok(Box::new(OptHead {
            norm: if self.final_norm { Some(self.load_norm(FINAL_NORM)?) } else { None },
            project_out: self.project_out().map(|spec| self.loader.linear(&spec)).transpose()?,
            weight: self.loader.tensor(self.head_name(), &self.embedding_shape())?,
        }))
    }
}

#[derive(Clone)]
struct OptLayer {
    groups: Vec<Vec<Linear>>,
    attention_norm: Norm,
    ffn_norm: Norm,
    /// Norms stand ahead of each half (all but 350m), or after the residual sum.
    norm_first: bool,
    attention: Attention,
    activation: Activation,
}

impl OptLayer {
    /// The residual sum in the post-norm order: normalised, it is both the stream and the next input.
    fn join_then_norm(residual: &Tensor, output: &Tensor, norm: &Norm) -> Result<Carry, ModelError> {
        let residual = norm.forward(&(residual + output)?)?;
        Ok(Carry { input: residual.clone(), residual })
    }
}

impl DecoderLayer for OptLayer {
    fn groups(&self) -> usize {
        self.groups.len()
    }

    fn begin(&self, hidden: &Tensor) -> Result<Carry, ModelError> {
        let input = if self.norm_first { self.attention_norm.forward(hidden)? } else { hidden.clone() };
        Ok(Carry { residual: hidden.clone(), input })
    }

    fn advance(&self, group: usize, carry: Carry) -> Result<Carry, ModelError> {
        let Carry { residual, input } = carry;
        match (group, self.groups[group].as_slice()) {
            (0, [q, k, v]) => {
                let (q, k, v) = (q.forward(&input)?, k.forward(&input)?, v.forward(&input)?);
                Ok(Carry { residual, input: self.attention.forward(&q, &k, &v, None)? })
            }
            (1, [out]) if self.norm_first => join(&residual, out.forward(&input)?, Some(&self.ffn_norm)),
            (1, [out]) => Self::join_then_norm(&residual, &out.forward(&input)?, &self.attention_norm),
            (2, [fc1]) => {
                let hidden = fc1.forward(&input)?;
                let input = match self.activation {
                    Activation::Gelu => hidden.gelu_erf()?,
                    _ => hidden.relu()?,
                };
                Ok(Carry { residual, input })
            }
            (3, [fc2]) if self.norm_first => join(&residual, fc2.forward(&input)?, None),
            (3, [fc2]) => Self::join_then_norm(&residual, &fc2.forward(&input)?, &self.ffn_norm),
            _ => unreachable!("a layer has the four groups that its decoder named"),
        }
    }

    fn weight(&self, group: usize, member: usize) -> &Tensor {
        self.groups[group][member].weight()
    }

    fn set_weight(&mut self, group: usize, member: usize, weight: Tensor) -> candle_core::Result<()> {
        self.groups[group][member].set_weight(weight)
    }

    fn bias(&self, group: usize, member: usize) -> Option<&Tensor> {
        self.groups[group][member].bias.as_ref()
    }

    fn set_bias(&mut self, group: usize, member: usize, bias: Tensor) {
        if let Some(place) = &mut self.groups[group][member].bias {
            *place = bias;
        }
    }

    fn anatomy(&self, _tokens: usize) -> Result<Anatomy, ModelError> {
        let Attention { heads, kv_heads, head_dim, window } = self.attention;
        Ok(Anatomy {
            heads,
            kv_heads,
            head_dim,
            window,
            rotation: None,
            head_norms: None,
            activation: self.activation,
            biases: anatomy::biases(&self.groups)?,
        })
    }

    fn share(&self) -> Box<dyn DecoderLayer> {
        Box::new(self.clone())
    }
}

struct OptHead {
    norm: Option<Norm>,
    project_out: Option<Linear>,
    weight: Tensor,
}

impl Head for OptHead {
    fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let mut hidden = hidden.clone();
        if let Some(norm) = &self.norm {
            hidden = norm.forward(&hidden)?;
        }
        if let Some(project_out) = &self.project_out {
            hidden = project_out.forward(&hidden)?;
        }
        Ok(hidden.matmul(&self.weight.t()?)?)
    }
}
