//! WIT types as text: short for people, deep (every name resolved) for comparing. Knows nothing of
//! what is right.

use std::fmt::Write;

use wit_parser::{Function, Handle, Resolve, Type, TypeDefKind, TypeId};

/// Depth to which a named type is written out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// By its name.
    Short,
    /// Down to the primitive types. Two functions are the same if their deep texts are.
    Deep,
}

/// `handle: func(message: borrow<message>) -> result<outcome, failure>`.
pub(crate) fn signature(resolve: &Resolve, function: &Function, depth: Depth) -> String {
    let params: Vec<String> = function
        .params
        .iter()
        .map(|param| format!("{}: {}", param.name, type_text(resolve, &param.ty, depth)))
        .collect();
    let mut text = format!("{}: func({})", function.item_name(), params.join(", "));
    if let Some(result) = &function.result {
        // Writing to a String cannot fail.
        let _ = write!(text, " -> {}", type_text(resolve, result, depth));
    }
    text
}

/// Returns true if two functions, each of its own package, have the same types. Names of parameters
/// do not count.
pub(crate) fn same_types(one: (&Resolve, &Function), other: (&Resolve, &Function)) -> bool {
    deep_types(one.0, one.1) == deep_types(other.0, other.1)
}

fn deep_types(resolve: &Resolve, function: &Function) -> (Vec<String>, Option<String>) {
    let deep = |ty: &Type| type_text(resolve, ty, Depth::Deep);
    (function.params.iter().map(|param| deep(&param.ty)).collect(), function.result.as_ref().map(deep))
}

fn type_text(resolve: &Resolve, ty: &Type, depth: Depth) -> String {
    let primitive = match ty {
        Type::Bool => "bool",
        Type::U8 => "u8",
        Type::U16 => "u16",
        Type::U32 => "u32",
        Type::U64 => "u64",
        Type::S8 => "s8",
        Type::S16 => "s16",
        Type::S32 => "s32",
        Type::S64 => "s64",
        Type::F32 => "f32",
        Type::F64 => "f64",
        Type::Char => "char",
        Type::String => "string",
        Type::ErrorContext => "error-context",
        Type::Id(id) => return named(resolve, *id, depth),
    };
    primitive.to_owned()
}

fn named(resolve: &Resolve, id: TypeId, depth: Depth) -> String {
    let definition = &resolve.types[id];
    match (&definition.name, &definition.kind) {
        // An alias is replaced by its target.
        (_, TypeDefKind::Type(Type::Id(target))) if depth == Depth::Deep => named(resolve, *target, depth),
        (_, TypeDefKind::Type(target)) if depth == Depth::Deep => type_text(resolve, target, depth),
        (Some(name), TypeDefKind::Resource) if depth == Depth::Deep => format!("resource {name}"),
        (Some(name), _) if depth == Depth::Short => name.clone(),
        (_, kind) => kind_text(resolve, kind, depth),
    }
}

fn kind_text(resolve: &Resolve, kind: &TypeDefKind, depth: Depth) -> String {
    let text = |ty: &Type| type_text(resolve, ty, depth);
    let optional = |ty: &Option<Type>| ty.as_ref().map_or_else(|| "_".to_owned(), text);
    let list = |keyword: &str, items: Vec<String>| format!("{keyword} {{ {} }}", items.join(", "));
    match kind {
        TypeDefKind::Record(record) => {
            list("record", record.fields.iter().map(|field| format!("{}: {}", field.name, text(&field.ty))).collect())
        }
        TypeDefKind::Variant(variant) => {
            let case = |case: &wit_parser::Case| match &case.ty {
                Some(ty) => format!("{}({})", case.name, text(ty)),
                None => case.name.clone(),
            };
            list("variant", variant.cases.iter().map(case).collect())
        }
        TypeDefKind::Enum(cases) => list("enum", cases.cases.iter().map(|case| case.name.clone()).collect()),
        TypeDefKind::Flags(flags) => list("flags", flags.flags.iter().map(|flag| flag.name.clone()).collect()),
        TypeDefKind::Tuple(tuple) => format!("tuple<{}>", tuple.types.iter().map(text).collect::<Vec<_>>().join(", ")),
        TypeDefKind::Handle(Handle::Own(id)) => format!("own<{}>", named(resolve, *id, depth)),
        TypeDefKind::Handle(Handle::Borrow(id)) => format!("borrow<{}>", named(resolve, *id, depth)),
        TypeDefKind::Option(ty) => format!("option<{}>", text(ty)),
        TypeDefKind::Result(result) => format!("result<{}, {}>", optional(&result.ok), optional(&result.err)),
        TypeDefKind::List(ty) => format!("list<{}>", text(ty)),
        TypeDefKind::FixedLengthList(ty, length) => format!("list<{}, {length}>", text(ty)),
        TypeDefKind::Map(key, value) => format!("map<{}, {}>", text(key), text(value)),
        TypeDefKind::Future(ty) => format!("future<{}>", optional(ty)),
        TypeDefKind::Stream(ty) => format!("stream<{}>", optional(ty)),
        TypeDefKind::Type(ty) => text(ty),
        TypeDefKind::Resource => "resource".to_owned(),
        TypeDefKind::Unknown => "unknown".to_owned(),
    }
}
