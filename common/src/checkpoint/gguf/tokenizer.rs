//! The tokenizer files that a GGUF file's metadata amounts to, in the form of the `tokenizers` library.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::metadata::Front;
use crate::checkpoint::CheckpointError;

/// Longest token, in bytes: merges are found by trying every cut.
const TOKEN_LIMIT: usize = 1024;
/// GGUF's numbers for tokens with a meaning beyond their text.
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;
const UNKNOWN: f64 = 2.0;

/// What Llama 3 and its descendants cut text by, with the longest run of digits left open.
fn cuts(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

/// Makes `tokenizer.json`, `tokenizer_config.json` and, if ids are known, `generation_config.json`; nothing if the file has
/// no tokenizer.
///
/// # Errors
/// `InvalidKey` for a tokenizer that is malformed or of a kind that is not known.
pub(super) fn companion_files(front: &Front) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
    let Some(kind) = front.text("tokenizer.ggml.model")? else { return Ok(Vec::new()) };
    let vocabulary = Vocabulary::read(front)?;
    let (mut tokenizer, adds_bos) = match kind {
        "gpt2" => byte_level(front, &vocabulary)?,
        "llama" => sentence_piece(front, &vocabulary)?,
        _ => return Err(front.invalid("tokenizer.ggml.model", "is neither gpt2 nor llama")),
    };
    let adds_bos = front.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
    let adds_eos = front.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let bos = special_id(front, "bos", &vocabulary)?;
    let eos = special_id(front, "eos", &vocabulary)?;
    let framed = framing(&vocabulary, bos.filter(|_| adds_bos), eos.filter(|_| adds_eos));
    let byte_level_processor =
        json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true });
    tokenizer["post_processor"] = framed.unwrap_or(if kind == "gpt2" { byte_level_processor } else { Value::Null });

    let mut config = json!({
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "clean_up_tokenization_spaces": false,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    for (key, name) in [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")]
    {
        if let Some(id) = special_id(front, name, &vocabulary)? {
            config[key] = json!(vocabulary.tokens[id]);
        }
    }
    if let Some(length) = front.integer("llama.context_length")? {
        config["model_max_length"] = json!(length);
    }
    if let Some(template) = front.text("tokenizer.chat_template")? {
        config["chat_template"] = json!(template);
    }
    let mut files = Vec::new();
    if bos.is_some() || eos.is_some() {
        let mut generation = Map::new();
        let padding = special_id(front, "padding", &vocabulary)?;
        for (key, id) in [("bos_token_id", bos), ("eos_token_id", eos), ("pad_token_id", padding)] {
            generation.extend(id.map(|id| (key.to_owned(), json!(id))));
        }
        files.push(("generation_config.json".to_owned(), pretty(&Value::Object(generation))));
    }
    files.push(("tokenizer.json".to_owned(), pretty(&tokenizer)));
    files.push(("tokenizer_config.json".to_owned(), pretty(&config)));
    Ok(files)
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// The tokens, by id and by text.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    ids: BTreeMap<&'a str, usize>,
    kinds: Option<Vec<f64>>,
}

impl<'a> Vocabulary<'a> {
    fn read(front: &'a Front) -> Result<Self, CheckpointError> {
        let key = "tokenizer.ggml.tokens";
        let tokens = front.texts(key)?.ok_or_else(|| front.invalid(key, "is missing"))?;
        if tokens.iter().any(|token| token.len() > TOKEN_LIMIT) {
            return Err(front.invalid(key, "has a token of more than 1024 bytes"));
        }
        let ids: BTreeMap<_, _> = tokens.iter().enumerate().map(|(id, &token)| (token, id)).collect();
        if ids.len() != tokens.len() {
            return Err(front.invalid(key, "has a token twice"));
        }
        let key = "tokenizer.ggml.token_type";
        let kinds = front.numbers(key)?;
        if kinds.as_ref().is_some_and(|kinds| kinds.len() != tokens.len()) {
            return Err(front.invalid(key, "has another length than tokenizer.ggml.tokens"));
        }
        Ok(Self { tokens, ids, kinds })
    }

    fn kind_is(&self, id: usize, kind: f64) -> bool {
        self.kinds.as_ref().is_some_and(|kinds| kinds[id].total_cmp(&kind).is_eq())
    }

    fn as_json(&self) -> Value {
        self.tokens.iter().enumerate().map(|(id, &token)| (token.to_owned(), json!(id))).collect::<Map<_, _>>().into()
    }

    fn added_tokens(&self) -> Value {
        let added = |id: &usize| [CONTROL, USER_DEFINED, UNKNOWN].iter().any(|&kind| self.kind_is(*id, kind));
        let entry = |id: usize| {
            json!({
                "id": id,
                "content": self.tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": !self.kind_is(id, USER_DEFINED),
            })
        };
        (0..self.tokens.len()).filter(added).map(entry).collect()
    }
}

fn special_id(front: &Front, name: &str, vocabulary: &Vocabulary<'_>) -> Result<Option<usize>, CheckpointError> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    match front.integer(&key)? {
        None => Ok(None),
        Some(id) => match usize::try_from(id).ok().filter(|&id| id < vocabulary.tokens.len()) {
            Some(id) => Ok(Some(id)),
            None => Err(front.invalid(&key, "is no token of the vocabulary")),
        },
    }
}

/// Puts the begin and end tokens around a text.
fn framing(vocabulary: &Vocabulary<'_>, bos: Option<usize>, eos: Option<usize>) -> Option<Value> {
    if bos.is_none() && eos.is_none() {
        return None;
    }
    let token = |id: Option<usize>, segment: u8| {
        id.map(|id| json!({ "SpecialToken": { "id": vocabulary.tokens[id], "type_id": segment } }))
    };
    let framed = |name: &str, segment: u8| {
        let text = json!({ "Sequence": { "id": name, "type_id": segment } });
        [token(bos, segment), Some(text), token(eos, segment)].into_iter().flatten()
    };
    let mut specials = Map::new();
    for id in [bos, eos].into_iter().flatten() {
        let token = vocabulary.tokens[id];
        specials.insert(token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }));
    }
    Some(json!({
        "type": "TemplateProcessing",
        "single": framed("A", 0).collect::<Value>(),
        "pair": framed("A", 0).chain(framed("B", 1)).collect::<Value>(),
        "special_tokens": specials,
    }))
}

fn tokenizer(
    vocabulary: &Vocabulary<'_>,
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
) -> Value {
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": decoder,
        "model": model,
    })
}

/// A byte-level BPE tokenizer, and whether its family starts texts with a begin token.
///
/// Deviation: a file that names no pre-tokenizer, or `default`, gets GPT-2's; llama.cpp warns and uses one of its own.
fn byte_level(front: &Front, vocabulary: &Vocabulary<'_>) -> Result<(Value, bool), CheckpointError> {
    let key = "tokenizer.ggml.merges";
    let merges = front.texts(key)?.ok_or_else(|| front.invalid(key, "is missing"))?;
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        // The space between the halves is not the first character: a half is never empty.
        let cut = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
        let pair = cut.map(|at| (&merge[..at], &merge[at + 1..]));
        match pair {
            Some((left, right)) if vocabulary.ids.contains_key(left) && vocabulary.ids.contains_key(right) => {
                pairs.push(json!([left, right]));
            }
            _ => return Err(front.invalid(key, "has a merge that is not of two tokens")),
        }
    }
    let bytes = |cuts_text: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": cuts_text });
    let cut_by = |pattern: String| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    let sequence = |first: Value, second: Value| json!({ "type": "Sequence", "pretokenizers": [first, second] });
    let (normalizer, pre_tokenizer, whole_words, adds_bos) = match front.text("tokenizer.ggml.pre")? {
        None | Some("default" | "gpt-2" | "gpt2") => (Value::Null, bytes(true), false, false),
        Some("smollm") => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            (Value::Null, sequence(digits, bytes(true)), false, false)
        }
        Some("llama-bpe" | "llama3" | "llama-v3") => {
            (Value::Null, sequence(cut_by(cuts("{1,3}")), bytes(false)), true, true)
        }
        Some("qwen2") => (json!({ "type": "NFC" }), sequence(cut_by(cuts("")), bytes(false)), false, false),
        Some(_) => return Err(front.invalid("tokenizer.ggml.pre", "is a pre-tokenizer that is not known")),
    };
    let model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": null,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": false,
        "byte_fallback": false,
        "ignore_merges": whole_words,
        "vocab": vocabulary.as_json(),
        "merges": pairs,
    });
    let decoder = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
    Ok((tokenizer(vocabulary, normalizer, pre_tokenizer, decoder, model), adds_bos))
}

/// A SentencePiece BPE tokenizer as transformers converts it: bytes for what has no token, merges from the scores.
fn sentence_piece(front: &Front, vocabulary: &Vocabulary<'_>) -> Result<(Value, bool), CheckpointError> {
    let key = "tokenizer.ggml.scores";
    let scores = front.numbers(key)?.ok_or_else(|| front.invalid(key, "is missing"))?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(front.invalid(key, "has another length than tokenizer.ggml.tokens"));
    }
    let unknown = special_id(front, "unknown", vocabulary)?.map(|id| vocabulary.tokens[id]);
    let prefixed = front.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let prefix = json!({ "type": "Prepend", "prepend": "▁" });
    let normalizers = if prefixed { vec![prefix, spaces] } else { vec![spaces] };
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefixed {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unknown,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": true,
        "byte_fallback": true,
        "ignore_merges": false,
        "vocab": vocabulary.as_json(),
        "merges": merges_from_scores(vocabulary, &scores),
    });
    let normalizer = json!({ "type": "Sequence", "normalizers": normalizers });
    let decoder = json!({ "type": "Sequence", "decoders": decoders });
    Ok((tokenizer(vocabulary, normalizer, Value::Null, decoder, model), true))
}

/// Every cut of every token into two tokens: best score first, among equal ones longest left half, then longest right half,
/// then order of the ids.
fn merges_from_scores(vocabulary: &Vocabulary<'_>, scores: &[f64]) -> Value {
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let mut cuts: Vec<_> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some(((*vocabulary.ids.get(left)?, *vocabulary.ids.get(right)?), left, right))
            })
            .collect();
        cuts.sort_unstable();
        merges.extend(cuts.into_iter().map(|(_, left, right)| (scores[id], left, right)));
    }
    let length = |text: &str| Reverse(text.chars().count());
    merges
        .sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (length(a.1), length(a.2)).cmp(&(length(b.1), length(b.2)))));
    merges.into_iter().map(|(_, left, right)| json!([left, right])).collect()
}
