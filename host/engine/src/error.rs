//! Errors before a message runs. Texts are for the owner of the component: what is wrong, what to
//! do; no backtraces of the host.

/// The engine cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A setting that must not be zero is.
    #[error("`max_instances` and `tick` must be more than zero")]
    Zero,
    /// wasmtime refuses its configuration, or this machine.
    #[error("the WASM engine cannot start: {0}")]
    Setup(String),
    /// The thread that keeps the deadlines cannot start.
    #[error("the thread that keeps the deadlines cannot start: {0}")]
    Thread(#[source] std::io::Error),
}

/// A component cannot be used as a processor. Found when it is loaded, never later.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// There are no bytes.
    #[error("the file is empty: it is no WASM component")]
    Empty,
    /// The bytes are something else.
    #[error("this is not WASM: it does not begin with `\\0asm`")]
    NotWasm,
    /// A module that was not turned into a component.
    #[error("this is a core WASM module, not a component: turn it into one with `hapax build`")]
    CoreModule,
    /// Cut off, or damaged.
    #[error("the component is truncated or damaged: {0}; build it again or copy it again")]
    Malformed(String),
    /// Nothing in it handles messages.
    #[error(
        "it is no processor: a processor exports `{expected}` with the function `{function}`, and this component \
         exports {found}"
    )]
    NoHandler {
        /// The interface that is missing.
        expected: String,
        /// Its function, with types.
        function: String,
        /// The export found instead.
        found: String,
    },
    /// Built against a contract that this host does not speak.
    #[error(
        "it was built for `{component}`, and this host speaks `{host}`: rebuild it, or use the host of that version"
    )]
    Version {
        /// The interface as the component names it.
        component: String,
        /// The host's.
        host: String,
    },
    /// A function of the contract with other types.
    #[error("function `{function}` of `{interface}` has other types\n  component: {component}\n  host:      {host}")]
    Types {
        /// The interface.
        interface: String,
        /// The function.
        function: String,
        /// Its types in the component.
        component: String,
        /// Its types in the contract.
        host: String,
    },
    /// An export of the contract without one of its functions.
    #[error("it exports `{interface}` without the function `{function}`")]
    MissingFunction {
        /// The interface.
        interface: String,
        /// The function, with types.
        function: String,
    },
    /// An import that this host does not have.
    #[error("it imports {import}, which this host does not grant; it grants {granted}")]
    Import {
        /// The import found.
        import: String,
        /// The imports that the host offers.
        granted: String,
    },
    /// Parts of the contract that do not go together.
    #[error("{0}")]
    Combination(&'static str),
    /// A step that would have no way back.
    #[error(
        "it registers the step `{step}`, which its `compensate` does not undo: it undoes {known}. Give it a \
         compensation for `{step}`"
    )]
    NotUndone {
        /// The step.
        step: String,
        /// The steps that it undoes.
        known: String,
    },
    /// It does not say which steps it has.
    #[error("it was asked which steps it registers and undoes, and: {0}")]
    Steps(String),
    /// More than the processor is granted, before its first message.
    #[error("it needs {needs} to start, and its limit is {limit}")]
    Limit {
        /// The resource that the component needs.
        needs: String,
        /// The limit of that resource.
        limit: String,
    },
    /// It cannot be compiled.
    #[error("it cannot be compiled: {0}")]
    Compile(String),
    /// It cannot be linked, for a reason that the checks above do not know.
    #[error("it cannot be linked with this host: {0}")]
    Link(String),
}

impl LoadError {
    /// A name for the kind of error that stays the same when the text changes.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Empty => "component-empty",
            Self::NotWasm => "component-not-wasm",
            Self::CoreModule => "component-core-module",
            Self::Malformed(_) => "component-malformed",
            Self::NoHandler { .. } => "contract-no-handler",
            Self::Version { .. } => "contract-version",
            Self::Types { .. } => "contract-types",
            Self::MissingFunction { .. } => "contract-missing-function",
            Self::Import { .. } => "contract-import",
            Self::Combination(_) => "contract-combination",
            Self::NotUndone { .. } => "contract-step-not-undone",
            Self::Steps(_) => "component-steps",
            Self::Limit { .. } => "component-limit",
            Self::Compile(_) => "component-compile",
            Self::Link(_) => "component-link",
        }
    }
}
