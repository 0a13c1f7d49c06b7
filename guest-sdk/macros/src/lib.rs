//! The attributes that make a function a processor. Writes the glue only; what runs is in
//! `hapax-sdk`.

use proc_macro::TokenStream;
use quote::{format_ident, quote};
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{Error, ItemFn, LitStr, Path, Result, Token};

/// Makes `fn(message, &mut Context) -> Result<Outcome, Failure>` what the component exports.
///
/// The message is a `Message`, or a `Json<T>` for its data. One function a crate. The function
/// stays as it is: tests call it, or give it to `hapax_sdk::testing::Harness`.
///
/// A processor that registers steps names the functions that undo them, each of them a
/// `#[compensation("...")]`: `#[processor(compensations(refund, release))]`. Only steps of theirs
/// can be registered.
#[proc_macro_attribute]
pub fn processor(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let expanded = syn::parse(arguments).and_then(|arguments: Arguments| {
        let function: ItemFn = syn::parse(item)?;
        check(&function)?;
        Ok(expand(&function, &arguments.compensations))
    });
    expanded.unwrap_or_else(Error::into_compile_error).into()
}

/// Makes `fn(payload, &mut Context) -> Result<(), Failure>` the way back of the step that it names:
/// `#[compensation("charge")]`.
///
/// The payload is what was registered with the step, as a `Json<T>`; or a `Message`, the one that
/// registered it, with that as its data. It must tolerate that the step was never taken, and that
/// it is compensated already. It works once a processor of the crate lists it.
#[proc_macro_attribute]
pub fn compensation(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let expanded = syn::parse(arguments).and_then(|step: LitStr| {
        let function: ItemFn = syn::parse(item)?;
        check_plain(&function)?;
        if function.sig.inputs.len() != 2 {
            let text = "a compensation takes two arguments: the step's payload, and `&mut Context`";
            return Err(Error::new_spanned(&function.sig.inputs, text));
        }
        if step.value().is_empty() {
            return Err(Error::new_spanned(step, "a step has a name"));
        }
        Ok(expand_compensation(&function, &step))
    });
    expanded.unwrap_or_else(Error::into_compile_error).into()
}

/// Arguments of `#[processor]`.
struct Arguments {
    compensations: Vec<Path>,
}

impl Parse for Arguments {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        if input.is_empty() {
            return Ok(Self { compensations: Vec::new() });
        }
        let word: syn::Ident = input.parse()?;
        if word != "compensations" {
            return Err(Error::new_spanned(word, "#[processor] takes `compensations(...)`, or nothing"));
        }
        let list;
        syn::parenthesized!(list in input);
        let compensations = Punctuated::<Path, Token![,]>::parse_terminated(&list)?.into_iter().collect();
        if input.is_empty() {
            Ok(Self { compensations })
        } else {
            Err(input.error("nothing comes after `compensations(...)`"))
        }
    }
}

/// The name under which `#[compensation]` leaves its step beside the function.
fn step_of(function: &Path) -> Path {
    let mut path = function.clone();
    if let Some(last) = path.segments.last_mut() {
        last.ident = format_ident!("__STEP_OF_{}", last.ident);
    }
    path
}

/// Makes `fn(batch: Batch) -> Answers` what the component exports: many messages in one call, each
/// answered by itself.
///
/// One function a crate, and not beside a `#[processor]`. The function stays as it is: tests give
/// it to `hapax_sdk::testing::Harness::batches`.
#[proc_macro_attribute]
pub fn batch_processor(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let arguments = proc_macro2::TokenStream::from(arguments);
    let expanded = syn::parse(item).and_then(|function: ItemFn| {
        if !arguments.is_empty() {
            return Err(Error::new_spanned(arguments, "#[batch_processor] takes no arguments"));
        }
        check_plain(&function)?;
        if function.sig.inputs.len() != 1 {
            return Err(Error::new_spanned(&function.sig.inputs, "a batch processor takes one argument: the batch"));
        }
        Ok(expand_batch(&function))
    });
    expanded.unwrap_or_else(Error::into_compile_error).into()
}

/// Checks whose errors are clearer than those of the trait bounds.
fn check(function: &ItemFn) -> Result<()> {
    check_plain(function)?;
    if function.sig.inputs.len() != 2 {
        let text = "a processor takes two arguments: the message, and `&mut Context`";
        return Err(Error::new_spanned(&function.sig.inputs, text));
    }
    Ok(())
}

fn check_plain(function: &ItemFn) -> Result<()> {
    let signature = &function.sig;
    if let Some(token) = &signature.asyncness {
        return Err(Error::new_spanned(token, "a processor is not async: the host waits for it, not it for the host"));
    }
    if !signature.generics.params.is_empty() {
        return Err(Error::new_spanned(&signature.generics, "a processor has no generic parameters"));
    }
    Ok(())
}

fn expand_compensation(function: &ItemFn, step: &LitStr) -> proc_macro2::TokenStream {
    let (name, visibility) = (&function.sig.ident, &function.vis);
    let constant = format_ident!("__STEP_OF_{}", name);
    quote! {
        #function

        #[doc(hidden)]
        #[allow(non_upper_case_globals, dead_code)]
        #visibility const #constant: ::hapax_sdk::__private::Undoes = (#step, {
            fn undo(
                message: ::hapax_sdk::Message,
                context: &mut ::hapax_sdk::Context,
            ) -> ::core::result::Result<(), ::hapax_sdk::Failure> {
                ::hapax_sdk::__private::call_compensation(#name, message, context)
            }
            undo
        });
    }
}

fn expand(function: &ItemFn, compensations: &[Path]) -> proc_macro2::TokenStream {
    let name = &function.sig.ident;
    let (forward, back) = (handler_export(), compensation_export(compensations));
    quote! {
        #function

        const _: () = {
            fn run(
                message: ::hapax_sdk::Message,
                context: &mut ::hapax_sdk::Context,
            ) -> ::core::result::Result<::hapax_sdk::Outcome, ::hapax_sdk::Failure> {
                ::hapax_sdk::__private::call(#name, message, context)
            }

            // Elsewhere than in a component nothing calls the function: this counts as its use.
            #[cfg(not(target_arch = "wasm32"))]
            const _: fn(
                ::hapax_sdk::Message,
                &mut ::hapax_sdk::Context,
            ) -> ::core::result::Result<::hapax_sdk::Outcome, ::hapax_sdk::Failure> = run;

            #forward
            #back
        };
    }
}

/// The way forward.
fn handler_export() -> proc_macro2::TokenStream {
    quote! {
        #[cfg(target_arch = "wasm32")]
        struct Processor;

        #[cfg(target_arch = "wasm32")]
        impl ::hapax_sdk::__private::Guest for Processor {
            fn handle(
                message: &::hapax_sdk::__private::Message,
            ) -> ::core::result::Result<::hapax_sdk::__private::Outcome, ::hapax_sdk::__private::Failure> {
                ::hapax_sdk::__private::run(message, run)
            }
        }

        // The ABI's entry points, which are unsafe, come from another crate's macro: a crate that
        // forbids unsafe code may be a processor.
        #[cfg(target_arch = "wasm32")]
        ::hapax_sdk::__private::export_processor!(Processor);
    }
}

/// The way back, if there is one.
fn compensation_export(compensations: &[Path]) -> proc_macro2::TokenStream {
    if compensations.is_empty() {
        return proc_macro2::TokenStream::new();
    }
    let undoes: Vec<Path> = compensations.iter().map(step_of).collect();
    quote! {
        #[cfg_attr(not(target_arch = "wasm32"), allow(dead_code))]
        const UNDOES: &[::hapax_sdk::__private::Undoes] = &[#(#undoes),*];

        #[cfg(target_arch = "wasm32")]
        impl ::hapax_sdk::__private::CompensationGuest for Processor {
            fn registers() -> ::std::vec::Vec<::std::string::String> {
                Self::steps()
            }

            fn steps() -> ::std::vec::Vec<::std::string::String> {
                UNDOES.iter().map(|(step, _)| (*step).into()).collect()
            }

            fn compensate(
                step: ::std::string::String,
                payload: ::std::vec::Vec<u8>,
                message: &::hapax_sdk::__private::Message,
            ) -> ::core::result::Result<(), ::hapax_sdk::__private::Failure> {
                ::hapax_sdk::__private::compensate(&step, payload, message, UNDOES)
            }
        }

        #[cfg(target_arch = "wasm32")]
        ::hapax_sdk::__private::export_compensator!(Processor);
    }
}

fn expand_batch(function: &ItemFn) -> proc_macro2::TokenStream {
    let name = &function.sig.ident;
    quote! {
        #function

        const _: () = {
            fn run(batch: ::hapax_sdk::Batch) -> ::hapax_sdk::Answers {
                ::hapax_sdk::__private::call_batch(#name, batch)
            }

            // Elsewhere than in a component nothing calls the function: this counts as its use.
            #[cfg(not(target_arch = "wasm32"))]
            const _: fn(::hapax_sdk::Batch) -> ::hapax_sdk::Answers = run;

            #[cfg(target_arch = "wasm32")]
            struct Processor;

            #[cfg(target_arch = "wasm32")]
            impl ::hapax_sdk::__private::BatchGuest for Processor {
                fn handle_batch(
                    messages: ::std::vec::Vec<::hapax_sdk::__private::Message>,
                ) -> ::std::vec::Vec<
                    ::core::result::Result<::hapax_sdk::__private::Outcome, ::hapax_sdk::__private::Failure>,
                > {
                    ::hapax_sdk::__private::run_batch(&messages, run)
                }
            }

            // As for one message at a time: the unsafe entry points come from another crate's
            // macro.
            #[cfg(target_arch = "wasm32")]
            ::hapax_sdk::__private::export_batch_processor!(Processor);
        };
    }
}
