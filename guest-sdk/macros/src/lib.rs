//! The attributes that make a function a processor. Writes the glue only; what runs is in `hapax-sdk`.

use proc_macro::TokenStream;
use quote::quote;
use syn::{Error, ItemFn, Result};

/// Makes `fn(message, &mut Context) -> Result<Outcome, Failure>` what the component exports.
///
/// The message is a `Message`, or a `Json<T>` for its data. One function a crate. The function stays as it is: tests
/// call it, or give it to `hapax_sdk::testing::Harness`.
#[proc_macro_attribute]
pub fn processor(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let arguments = proc_macro2::TokenStream::from(arguments);
    let expanded = syn::parse(item).and_then(|function: ItemFn| {
        if !arguments.is_empty() {
            return Err(Error::new_spanned(arguments, "#[processor] takes no arguments"));
        }
        check(&function)?;
        Ok(expand(&function))
    });
    expanded.unwrap_or_else(Error::into_compile_error).into()
}

/// Makes `fn(batch: Batch) -> Answers` what the component exports: many messages in one call, each answered by itself.
///
/// One function a crate, and not beside a `#[processor]`. The function stays as it is: tests give it to
/// `hapax_sdk::testing::Harness::batches`.
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

/// What the trait bounds would say less plainly.
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

fn expand(function: &ItemFn) -> proc_macro2::TokenStream {
    let name = &function.sig.ident;
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

            // The ABI's entry points, which are unsafe, come from another crate's macro: a crate that forbids unsafe
            // code may be a processor.
            #[cfg(target_arch = "wasm32")]
            ::hapax_sdk::__private::export_processor!(Processor);
        };
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

            // As for one message at a time: the unsafe entry points come from another crate's macro.
            #[cfg(target_arch = "wasm32")]
            ::hapax_sdk::__private::export_batch_processor!(Processor);
        };
    }
}
