//! Answers, before they become HTTP responses.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::{
    HeaderMap, Response, StatusCode,
    body::{Body, Frame, SizeHint},
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
};
use serde::Serialize;
use tokio::sync::mpsc::Receiver;

use crate::{calls::UnderWay, memory::Memory};

/// The name of the header with the id of a request.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-log-requestid");

/// A body in pieces that share memory with the blocks of the engine. The memory that the service
/// accounts for them is free again when the last piece has been sent.
#[derive(Debug, Default)]
pub(crate) struct Chunks {
    chunks: VecDeque<Bytes>,
    left: u64,
    memory: Option<Memory>,
    /// Pieces that are still to be made.
    coming: Option<Receiver<Bytes>>,
    /// The call that this answers.
    call: Option<UnderWay>,
}

impl Chunks {
    pub(crate) fn new(chunks: impl IntoIterator<Item = Bytes>) -> Self {
        let chunks: VecDeque<Bytes> =
            chunks.into_iter().filter(|chunk| !chunk.is_empty()).collect();
        let left = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        Self { chunks, left, ..Self::default() }
    }

    /// A body whose pieces are made while it is sent.
    pub(crate) fn coming(pieces: Receiver<Bytes>) -> Self {
        Self { coming: Some(pieces), ..Self::default() }
    }

    /// The body of the answer to this call, which is under way until the body has been sent.
    pub(crate) fn of_call(&mut self, call: UnderWay) {
        self.call = Some(call);
    }

    /// The bytes that are left, as far as they are known.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }
}

impl Body for Chunks {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Some(coming) = &mut self.coming {
            return coming.poll_recv(context).map(|piece| piece.map(|it| Ok(Frame::data(it))));
        }
        let Some(chunk) = self.chunks.pop_front() else {
            self.memory = None;
            return Poll::Ready(None);
        };
        self.left -= chunk.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.chunks.is_empty() && self.coming.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match self.coming {
            Some(_) => SizeHint::default(),
            None => SizeHint::with_exact(self.left),
        }
    }
}

/// An answer to a call.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Chunks,
}

impl Answer {
    /// Success, with an empty body. It has no content type: clients parse every body of the type
    /// JSON.
    pub(crate) fn empty() -> Self {
        Self { status: StatusCode::OK, headers: HeaderMap::new(), body: Chunks::default() }
    }

    pub(crate) fn json(body: &impl Serialize) -> Self {
        Self::json_with(StatusCode::OK, body)
    }

    pub(crate) fn json_with(status: StatusCode, body: &impl Serialize) -> Self {
        // Values that the service makes can always be written as JSON.
        let text = serde_json::to_vec(body).unwrap_or_default();
        let mut answer = Self::of(Chunks::new([Bytes::from(text)]), "application/json");
        answer.status = status;
        answer
    }

    pub(crate) fn text(status: StatusCode, text: impl Into<String>) -> Self {
        let body = Chunks::new([Bytes::from(text.into())]);
        let mut answer = Self::of(body, "text/plain; charset=utf-8");
        answer.status = status;
        answer
    }

    pub(crate) fn of(body: Chunks, content_type: &'static str) -> Self {
        let mut answer = Self { body, ..Self::empty() };
        answer.headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        answer
    }

    /// Adds a header. A value that no header can have is left out.
    #[must_use]
    pub(crate) fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        if let Ok(value) = HeaderValue::from_str(&value.to_string()) {
            self.headers.insert(HeaderName::from_static(name), value);
        }
        self
    }

    /// Accounts the body for this memory, and gives back the rest.
    #[must_use]
    pub(crate) fn holding(mut self, mut memory: Memory) -> Self {
        memory.shrink(usize::try_from(self.body.left).unwrap_or(usize::MAX));
        self.body.memory = Some(memory);
        self
    }

    pub(crate) fn into_response(self, request_id: &str) -> Response<Chunks> {
        let mut response = Response::new(self.body);
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        if let Ok(id) = HeaderValue::from_str(request_id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        response
    }
}
