//! EBNF as llama.cpp (GBNF) and XGrammar write it, `rule ::= "text" [a-z]+ (other | "x")?`, rewritten in Lark's notation.

use std::{collections::HashMap, fmt::Write as _, iter::Peekable, str::Chars};

use super::lark;

type Result<T> = std::result::Result<T, String>;

/// The rule that a text must match.
const ROOT: &str = "root";

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Name(String),
    /// `::=`
    Defines,
    Literal(String),
    /// A regular expression of one character.
    Class(String),
    /// `( ) | * + ?`, and a count in braces as it is.
    Operator(String),
}

/// Whether a grammar is in this notation and not in Lark's.
pub(super) fn is_ebnf(grammar: &str) -> bool {
    let rule = |line: &str| {
        let (name, _) = line.split_once("::=")?;
        let name = name.trim();
        (!name.is_empty() && name.chars().all(is_name)).then_some(())
    };
    grammar.lines().find_map(rule).is_some()
}

/// Errors name the rule or the character that is wrong.
pub(super) fn to_lark(grammar: &str) -> Result<String> {
    let tokens = Scanner {
        chars: grammar.chars().peekable(),
    }
    .tokens()?;
    let names = names(&tokens)?;
    let mut out = String::new();
    let mut rest = &tokens[..];
    while let [Token::Name(name), Token::Defines, after @ ..] = rest {
        let is_next = |pair: &[Token]| matches!(pair, [Token::Name(_), Token::Defines]);
        let end = after.windows(2).position(is_next).unwrap_or(after.len());
        let body = body(&after[..end], &names).map_err(|error| format!("rule {name}: {error}"))?;
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{}: {body}", names[name.as_str()]);
        rest = &after[end..];
    }
    match rest {
        [] => Ok(out),
        _ => Err("must begin with a rule, `name ::= ...`".into()),
    }
}

/// Lark's name of every rule: its rules are of lower case, and these need not be.
fn names(tokens: &[Token]) -> Result<HashMap<&str, String>> {
    let mut names = HashMap::new();
    for pair in tokens.windows(2) {
        let [Token::Name(name), Token::Defines] = pair else {
            continue;
        };
        let lark = match name.as_str() {
            ROOT => "start".to_owned(),
            _ => format!("r{}", names.len()),
        };
        if names.insert(name.as_str(), lark).is_some() {
            return Err(format!("rule {name} is defined twice"));
        }
    }
    match names.contains_key(ROOT) {
        true => Ok(names),
        false => Err(format!("has no rule {ROOT}")),
    }
}

fn body(tokens: &[Token], names: &HashMap<&str, String>) -> Result<String> {
    let mut parts: Vec<String> = Vec::new();
    // An alternative may be empty here, and is an empty text there.
    let mut empty = true;
    for token in tokens {
        match token {
            Token::Operator(operator) if matches!(operator.as_str(), "|" | ")") => {
                if empty {
                    parts.push(lark::quoted(""));
                }
                parts.push(operator.clone());
                empty = operator == "|";
                continue;
            }
            Token::Operator(operator) if operator == "(" => {
                parts.push(operator.clone());
                empty = true;
                continue;
            }
            Token::Operator(operator) => match parts.last_mut() {
                // A repetition belongs to what it stands behind.
                Some(last) if !empty => last.push_str(operator),
                _ => return Err(format!("{operator} repeats nothing")),
            },
            Token::Name(name) => {
                let lark = names.get(name.as_str());
                parts.push(lark.ok_or_else(|| format!("{name} is not defined"))?.clone());
            }
            Token::Literal(text) => parts.push(lark::quoted(text)),
            Token::Class(class) => parts.push(class.clone()),
            Token::Defines => return Err("::= stands behind no name".into()),
        }
        empty = false;
    }
    if empty {
        parts.push(lark::quoted(""));
    }
    Ok(parts.join(" "))
}

fn is_name(char: char) -> bool {
    char.is_ascii_alphanumeric() || char == '_' || char == '-'
}

struct Scanner<'a> {
    chars: Peekable<Chars<'a>>,
}

impl Scanner<'_> {
    fn tokens(mut self) -> Result<Vec<Token>> {
        let mut tokens = Vec::new();
        while let Some(char) = self.chars.next() {
            tokens.push(match char {
                _ if char.is_whitespace() => continue,
                '#' => {
                    while self.chars.next().is_some_and(|char| char != '\n') {}
                    continue;
                }
                '"' => Token::Literal(self.literal()?),
                '[' => Token::Class(self.class()?),
                '.' => Token::Class("/(?s:.)/".into()),
                '(' | ')' | '|' | '*' | '+' | '?' => Token::Operator(char.into()),
                '{' => Token::Operator(self.count()?),
                ':' if self.chars.next() == Some(':') && self.chars.next() == Some('=') => Token::Defines,
                _ if is_name(char) => {
                    let mut name = String::from(char);
                    while let Some(next) = self.chars.next_if(|&char| is_name(char)) {
                        name.push(next);
                    }
                    Token::Name(name)
                }
                _ => return Err(format!("unexpected character {char:?}")),
            });
        }
        Ok(tokens)
    }

    fn count(&mut self) -> Result<String> {
        let mut count = String::from('{');
        loop {
            match self.chars.next() {
                Some('}') => break,
                Some(char) if char.is_ascii_digit() || char == ',' => count.push(char),
                Some(' ') => {}
                _ => return Err("a repetition is {n}, {n,} or {n,m}".into()),
            }
        }
        count.push('}');
        Ok(count)
    }

    fn literal(&mut self) -> Result<String> {
        let mut text = String::new();
        loop {
            match self.chars.next() {
                None => return Err("a string does not end".into()),
                Some('"') => return Ok(text),
                Some('\\') => text.push(self.escaped()?),
                Some(char) => text.push(char),
            }
        }
    }

    /// Every character by its number, so that none has a meaning of its own.
    fn class(&mut self) -> Result<String> {
        let negated = self.chars.next_if_eq(&'^').is_some();
        let mut class = String::from(if negated { "/[^" } else { "/[" });
        let mut is_empty = true;
        loop {
            let char = match self.chars.next() {
                None => return Err("a character class does not end".into()),
                Some(']') if is_empty => return Err("a character class is empty".into()),
                Some(']') => {
                    class.push_str("]/");
                    return Ok(class);
                }
                Some('\\') => self.escaped()?,
                Some('-') if !is_empty && self.chars.peek() != Some(&']') => {
                    class.push('-');
                    continue;
                }
                Some(char) => char,
            };
            let _ = write!(class, "\\u{{{:X}}}", u32::from(char));
            is_empty = false;
        }
    }

    fn escaped(&mut self) -> Result<char> {
        let char = self.chars.next().ok_or("an escape does not end")?;
        let digits = match char {
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ if char.is_ascii_punctuation() => return Ok(char),
            _ => return Err(format!("unknown escape \\{char}")),
        };
        let mut value = 0u32;
        for _ in 0..digits {
            let digit = self.chars.next().and_then(|char| char.to_digit(16));
            let digit = digit.ok_or_else(|| format!("\\{char} needs {digits} hexadecimal digits"))?;
            value = value << 4 | digit;
        }
        char::from_u32(value).ok_or_else(|| format!("\\{char} is no character"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_rewritten() {
        let grammar = "# a list\nroot ::= \"[\" Item-1 (\",\" Item-1)* \"]\"\nItem-1 ::= [a-z\\]^-]+ | \"\\x41\\n\" |\n  . {2,3}\n";
        let lark = "start: \"[\" r1 ( \",\" r1 )* \"]\"\nr1: /[\\u{61}-\\u{7A}\\u{5D}\\u{5E}\\u{2D}]/+ | \"A\\n\" | /(?s:.)/{2,3}\n";
        assert!(is_ebnf(grammar));
        assert_eq!(to_lark(grammar).as_deref(), Ok(lark));
        assert!(!is_ebnf("start: \"a ::= b\" | x\n"));
    }

    #[test]
    fn empty_alternatives_are_empty_texts() {
        let lark = "start: \"\" | ( \"\" | \"a\" ) | \"\"\n";
        assert_eq!(to_lark("root ::= | (|\"a\") |").as_deref(), Ok(lark));
    }

    #[test]
    fn mistakes_are_named() {
        for (grammar, part) in [
            ("a ::= \"x\"", "no rule root"),
            ("root ::= x", "x is not defined"),
            ("root ::= \"x", "does not end"),
            ("root ::= \"x\" root ::= \"y\"", "defined twice"),
            ("root ::= *", "repeats nothing"),
            ("root ::= \"\\q\"", "unknown escape"),
            ("root ::= \"\\uD800\"", "no character"),
            ("root ::= [a", "does not end"),
            ("root ::= []", "empty"),
            ("root ::= a{x}", "a repetition"),
            ("root ::= \u{1F600}", "unexpected character"),
            ("\"x\" root ::= \"y\"", "must begin with a rule"),
        ] {
            let error = to_lark(grammar).expect_err(grammar);
            assert!(error.contains(part), "{grammar}: {error}");
        }
    }
}
