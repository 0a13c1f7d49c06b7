//! JSON as its text says it: numbers stay text, members with one name stay apart, strings are
//! unescaped, no depth is too deep. A document is a list of nodes over the text; it decides nothing
//! about what is equal.

use std::borrow::Cow;

use smallvec::SmallVec;

/// Bytes of text for each node, on average, for which room is made at once.
const TEXT_BYTES_PER_NODE: usize = 8;

/// A JSON text, read once.
pub(super) struct Document<'a> {
    text: &'a [u8],
    /// Contents of the strings that are written with escapes.
    decoded: Vec<u8>,
    /// The values and the members' names, each in front of all that it holds; the first is the
    /// whole text.
    nodes: Vec<Node>,
}

/// Index of a value or of a member's name.
pub(super) type NodeIndex = u32;

/// The whole text.
pub(super) const ROOT: NodeIndex = 0;

/// A value, or the name of a member, whose value is the next node.
#[derive(Clone, Copy)]
struct Node {
    kind: Kind,
    /// Range of its bytes: of the content of a string, of the text of anything else.
    start: u32,
    end: u32,
    /// Index of the first node behind it and all that it holds.
    behind: NodeIndex,
}

/// Kind of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// `null`, `true` or `false`.
    Literal,
    Number,
    /// A string, or a name, whose content is a part of the text.
    Text,
    /// A string, or a name, that is written with escapes.
    Decoded,
    Array,
    Object,
}

/// Error: a member that a pointer goes through, or to, is there more than once.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RepeatedName(pub(super) String);

impl<'a> Document<'a> {
    /// Reads JSON. Returns `None` if `data` is not JSON, or holds a string that is no Unicode text.
    pub(super) fn parse(data: &'a [u8]) -> Option<Self> {
        std::str::from_utf8(data).ok()?;
        // Every index fits: neither nodes nor unescaped bytes are more than bytes of text.
        u32::try_from(data.len()).ok()?;
        let nodes = Vec::with_capacity(data.len() / TEXT_BYTES_PER_NODE + 1);
        let mut reader = Reader { text: data, at: 0, decoded: Vec::new(), nodes, open: SmallVec::new() };
        reader.document()?;
        Some(Self { text: data, decoded: reader.decoded, nodes: reader.nodes })
    }

    /// Returns every value and every member's name, in the order of the text.
    pub(super) fn nodes(&self) -> impl Iterator<Item = NodeIndex> {
        ROOT..self.nodes.len() as NodeIndex
    }

    pub(super) fn kind(&self, node: NodeIndex) -> Kind {
        self.nodes[node as usize].kind
    }

    /// Returns the unescaped content of a string, or the text of anything else.
    pub(super) fn bytes(&self, node: NodeIndex) -> &[u8] {
        let Node { kind, start, end, .. } = self.nodes[node as usize];
        let bytes = if kind == Kind::Decoded { &self.decoded } else { self.text };
        &bytes[start as usize..end as usize]
    }

    /// Returns the index of the first node behind `node` and all that it holds.
    pub(super) fn behind(&self, node: NodeIndex) -> NodeIndex {
        self.nodes[node as usize].behind
    }

    /// Returns the names of an object's members, in the order of the text; the value of each is
    /// the node after it.
    pub(super) fn names(&self, object: NodeIndex) -> impl Iterator<Item = NodeIndex> {
        self.chain(object, |name| self.behind(name + 1))
    }

    fn items(&self, array: NodeIndex) -> impl Iterator<Item = NodeIndex> {
        self.chain(array, |item| self.behind(item))
    }

    fn chain(&self, holder: NodeIndex, next: impl Fn(NodeIndex) -> NodeIndex) -> impl Iterator<Item = NodeIndex> {
        let (mut at, end) = (holder + 1, self.behind(holder));
        std::iter::from_fn(move || {
            let found = (at < end).then_some(at)?;
            at = next(found);
            Some(found)
        })
    }

    /// Returns the value at a JSON pointer (RFC 6901), if it is there.
    pub(super) fn at(&self, pointer: &str) -> Result<Option<NodeIndex>, RepeatedName> {
        let Some(path) = pointer.strip_prefix('/') else { return Ok(pointer.is_empty().then_some(ROOT)) };
        let mut node = ROOT;
        for token in path.split('/') {
            let token = unescaped(token);
            let next = match self.kind(node) {
                Kind::Object => self.member(node, &token)?,
                Kind::Array => index(&token).and_then(|index| self.items(node).nth(index)),
                _ => None,
            };
            let Some(next) = next else { return Ok(None) };
            node = next;
        }
        Ok(Some(node))
    }

    fn member(&self, object: NodeIndex, name: &str) -> Result<Option<NodeIndex>, RepeatedName> {
        let mut found = self.names(object).filter(|candidate| self.bytes(*candidate) == name.as_bytes());
        match (found.next(), found.next()) {
            (Some(_), Some(_)) => Err(RepeatedName(name.to_owned())),
            (found, _) => Ok(found.map(|name| name + 1)),
        }
    }
}

/// Returns a token of a pointer without its escapes.
fn unescaped(token: &str) -> Cow<'_, str> {
    if token.contains('~') { token.replace("~1", "/").replace("~0", "~").into() } else { token.into() }
}

/// Returns the index that a token of a pointer is: digits without a leading zero.
fn index(token: &str) -> Option<usize> {
    let is_index = token == "0" || (!token.starts_with(['0', '+']) && !token.is_empty());
    is_index.then(|| token.parse().ok()).flatten()
}

/// Reads a text from its begin to its end. Holds the open arrays and objects in a list, and so
/// needs no stack.
struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    decoded: Vec<u8>,
    nodes: Vec<Node>,
    open: SmallVec<[NodeIndex; 16]>,
}

impl Reader<'_> {
    fn document(&mut self) -> Option<()> {
        loop {
            self.value()?;
            // The value may be the last of those that hold it.
            loop {
                self.skip_space();
                let Some(&open) = self.open.last() else { return (self.at == self.text.len()).then_some(()) };
                match (self.nodes[open as usize].kind, self.next()?) {
                    (Kind::Array, b',') => break,
                    (Kind::Object, b',') => {
                        self.name()?;
                        break;
                    }
                    (Kind::Array, b']') | (Kind::Object, b'}') => self.close(),
                    _ => return None,
                }
            }
        }
    }

    /// Reads a scalar, an array or object that is empty, or everything up to the first scalar that
    /// others hold.
    fn value(&mut self) -> Option<()> {
        loop {
            self.skip_space();
            match self.peek()? {
                b'"' => return self.string(),
                b'-' | b'0'..=b'9' => return self.number(),
                b'{' => {
                    self.open(Kind::Object);
                    if self.closes(b'}') {
                        return Some(());
                    }
                    self.name()?;
                }
                b'[' => {
                    self.open(Kind::Array);
                    if self.closes(b']') {
                        return Some(());
                    }
                }
                _ => return self.literal(),
            }
        }
    }

    fn open(&mut self, kind: Kind) {
        self.open.push(self.nodes.len() as NodeIndex);
        self.push(kind, self.at, self.at);
        self.at += 1;
    }

    /// Closes the array or object that was opened last if `end` is next.
    fn closes(&mut self, end: u8) -> bool {
        self.skip_space();
        let closes = self.peek() == Some(end);
        if closes {
            self.at += 1;
            self.close();
        }
        closes
    }

    fn close(&mut self) {
        if let Some(open) = self.open.pop() {
            let behind = self.nodes.len() as NodeIndex;
            let node = &mut self.nodes[open as usize];
            (node.end, node.behind) = (self.at as u32, behind);
        }
    }

    /// Reads the name of a member, and the colon behind it.
    fn name(&mut self) -> Option<()> {
        self.skip_space();
        (self.peek()? == b'"').then_some(())?;
        self.string()?;
        self.skip_space();
        (self.next()? == b':').then_some(())
    }

    fn string(&mut self) -> Option<()> {
        let start = self.at + 1;
        self.at = start;
        self.skip_plain();
        match self.peek()? {
            b'"' => {
                self.push(Kind::Text, start, self.at);
                self.at += 1;
                Some(())
            }
            b'\\' => self.decode(start),
            _ => None,
        }
    }

    /// Reads the rest of a string that begins at `start` and has an escape here.
    #[cold]
    fn decode(&mut self, start: usize) -> Option<()> {
        let decoded_start = self.decoded.len();
        let mut copied = start;
        loop {
            self.skip_plain();
            self.decoded.extend_from_slice(&self.text[copied..self.at]);
            match self.next()? {
                b'"' => {
                    self.push(Kind::Decoded, decoded_start, self.decoded.len());
                    return Some(());
                }
                b'\\' => self.escape()?,
                _ => return None,
            }
            copied = self.at;
        }
    }

    /// Reads an escape behind its backslash.
    fn escape(&mut self) -> Option<()> {
        let byte = match self.next()? {
            b'b' => 0x08,
            b't' => b'\t',
            b'n' => b'\n',
            b'f' => 0x0c,
            b'r' => b'\r',
            b'u' => {
                let character = self.unicode()?;
                self.decoded.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                return Some(());
            }
            same @ (b'"' | b'\\' | b'/') => same,
            _ => return None,
        };
        self.decoded.push(byte);
        Some(())
    }

    /// Reads the digits of a `\u`, and those of the second half of a surrogate pair. A half without
    /// the other is no Unicode text.
    fn unicode(&mut self) -> Option<char> {
        let first = self.four_digits()?;
        let (0xd800..0xdc00, b"\\u") = (first, self.text.get(self.at..self.at + 2).unwrap_or_default()) else {
            return char::from_u32(first);
        };
        self.at += 2;
        let second = self.four_digits()?.checked_sub(0xdc00).filter(|second| *second < 0x400)?;
        char::from_u32(0x10000 + ((first - 0xd800) << 10) + second)
    }

    fn four_digits(&mut self) -> Option<u32> {
        let digits = self.text.get(self.at..self.at + 4)?;
        self.at += 4;
        digits.iter().try_fold(0, |number, digit| Some(number * 16 + char::from(*digit).to_digit(16)?))
    }

    fn number(&mut self) -> Option<()> {
        let start = self.at;
        self.at += usize::from(self.text[start] == b'-');
        match self.next()? {
            b'0' => {}
            b'1'..=b'9' => self.skip_digits(),
            _ => return None,
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            self.at += usize::from(matches!(self.peek(), Some(b'+' | b'-')));
            self.digits()?;
        }
        self.push(Kind::Number, start, self.at);
        Some(())
    }

    /// Reads one digit or more.
    fn digits(&mut self) -> Option<()> {
        let start = self.at;
        self.skip_digits();
        (self.at > start).then_some(())
    }

    fn literal(&mut self) -> Option<()> {
        let rest = &self.text[self.at..];
        let literal = [&b"null"[..], b"true", b"false"].into_iter().find(|literal| rest.starts_with(literal))?;
        self.push(Kind::Literal, self.at, self.at + literal.len());
        self.at += literal.len();
        Some(())
    }

    fn push(&mut self, kind: Kind, start: usize, end: usize) {
        let behind = self.nodes.len() as NodeIndex + 1;
        self.nodes.push(Node { kind, start: start as u32, end: end as u32, behind });
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    fn skip_space(&mut self) {
        self.skip(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r'));
    }

    fn skip_digits(&mut self) {
        self.skip(|byte| byte.is_ascii_digit());
    }

    /// Goes on to the next quote, backslash or control character of a string.
    fn skip_plain(&mut self) {
        self.skip(|byte| PLAIN[usize::from(byte)]);
    }

    fn skip(&mut self, is_skipped: impl Fn(u8) -> bool) {
        let rest = &self.text[self.at..];
        self.at += rest.iter().position(|byte| !is_skipped(*byte)).unwrap_or(rest.len());
    }
}

/// Bytes that stand for themselves in a string.
const PLAIN: [bool; 256] = {
    let mut plain = [true; 256];
    let mut byte = 0;
    while byte < 0x20 {
        plain[byte] = false;
        byte += 1;
    }
    plain[b'"' as usize] = false;
    plain[b'\\' as usize] = false;
    plain
};
